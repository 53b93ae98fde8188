"""The paper's claims: what the protocol asks, what the records answer, and the verdict that follows.

Chapter 11 and the start page. `data/protocol.yaml` names one primary row for each of 16 parts. What is looked
for in a folder of records, and picked up as soon as it is there:

    segmentation.zip        arms "real, long", "real + 1 text-seg, long", "real, long, not augmented": 1a, 1b, 6
    classification.zip      arms "real, NET, long", "real + text-seg, NET, long" and "every fourth, NET, long", NET
                            of `NETWORKS`, trained to their end: 1c, 1d
    03_unconditional, 04_text_guided, 05_text_and_segmentation_guided, 06_semantic_diffusion_baseline and
    fid_analysis, all .json: 2a to 5b
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from scipy import stats

from diffecho_utils import DiffEchoError, camus, intervals, results, runs

VERDICTS = ("holds", "the opposite", "does not hold", "cannot tell", "not measured")
TASKS = ("segmentation", "classification", "pretrained")
NETWORKS = ("resnet18", "efficientnet-b0")
FIELDS = {"says", "row", "unit", "margin", "visible", "evidence"}  # and, of some, control
EVIDENCE = ("direct", "stand-in", "none")
LEAST = 3  # runs of an arm: fewer cannot say how much runs vary


@dataclass(frozen=True)
class Found:
    effect: tuple  # value, low, high, in the row's unit; positive speaks for the claim
    n: str
    record: dict  # of its making
    control: tuple | None = None  # value, low, high of what must come out above zero


def read(path):
    """(day it was written, {part: row}) of a protocol; raises DiffEchoError with all that is wrong in it."""
    try:
        protocol = yaml.safe_load(Path(path).read_text())
        written, claims = str(protocol["written"]), dict(protocol["claims"])
    except (OSError, yaml.YAMLError, LookupError, TypeError, ValueError) as error:
        raise DiffEchoError(
            f"{path}: no protocol ({error}); restore it from the repository"
        ) from None
    wrong = [f"{len(claims)} rows, 16 are needed"] if len(claims) != 16 else []
    claims = {str(part): row for part, row in claims.items()}
    for part, row in claims.items():
        fields = set(row) if isinstance(row, dict) else set()
        needed = {"says", "row", "evidence"} if fields and row.get("evidence") == "none" else FIELDS
        if lost := needed - fields | fields - FIELDS - {"control"}:
            wrong.append(f"row {part}: lacks, or does not know, {', '.join(sorted(lost))}")
            continue
        if row["evidence"] not in EVIDENCE:
            wrong.append(f"row {part}: evidence {row['evidence']!r}, one of {', '.join(EVIDENCE)}")
        for name in needed & {"margin", "visible"}:
            value = row[name]
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not 0 < value < np.inf
            ):
                wrong.append(f"row {part}: {name} {value!r} found, a number above 0 is needed")
    if wrong:
        raise DiffEchoError(f"{path}: " + "; ".join(wrong) + "; restore it from the repository")
    return written, claims


def verdict(row, effect, control=None):
    """One of `VERDICTS` for a row of the protocol, its effect and its control, each (value, low, high) or None.

    Cannot tell wherever an end is no number, or the row has a control that was not run.
    """
    if effect is None:
        return "not measured"
    low, high = effect[1:]
    if not np.isfinite([low, high]).all() or ("control" in row and control is None):
        return "cannot tell"
    could_show = control is None or control[1] > 0
    if high < 0:
        return "the opposite"
    if high < row["margin"]:
        return "does not hold" if could_show else "cannot tell"
    return "holds" if low > 0 else "cannot tell"


def judged(claims, found, written=""):
    """{part: what a line of the table needs}, plain values for a record; found: {part: `Found`, or why not}.

    written: day of the protocol; what was made before it is marked as `earlier`.
    """
    lines = {}
    for part, row in claims.items():
        mine = found.get(part, "runs not made yet")
        there = isinstance(mine, Found)
        effect, control = (mine.effect, mine.control) if there else (None, None)
        line = {name: row.get(name) for name in ("says", "unit", "margin", "visible", "evidence")}
        line |= {"verdict": verdict(row, effect, control), "effect": effect, "control": control}
        if there:
            line |= {"n": mine.n, "from": results.describe(mine.record), "why": ""}
            line["earlier"] = mine.record["date"].split(", ")[0] < written
            if "control" in row and control is None:
                line["why"] = "runs of the control not made yet"
            elif line["verdict"] == "cannot tell" and effect[2] < row["margin"]:
                line["why"] = "the control did not come out above zero"
            elif line["verdict"] == "cannot tell":
                line["why"] = "the interval holds zero and the margin"
        else:
            line["why"] = row["row"] if row["evidence"] == "none" else mine
        lines[part] = line
    return lines


def table(lines):
    """The 16 lines of `judged` as a Markdown table, in the order of `VERDICTS`."""
    rows = [
        "| claim | verdict | effect, 95 % interval | visible | evidence |",
        "|---|---|---|---|---|",
    ]
    for part, line in sorted(lines.items(), key=lambda item: VERDICTS.index(item[1]["verdict"])):
        mark = "†" if line.get("earlier") else ""
        smallest = "" if line["visible"] is None else f"{line['visible']:g}"
        cells = [f"{part} {line['says']}", f"**{line['verdict']}**", told(line) + mark]
        rows.append("| " + " | ".join([*cells, smallest, line["evidence"]]) + " |")
    return "\n".join(rows)


def told(line):
    """ "-0.18 [-0.31, -0.04] Dice points": an effect with digits to suit its margin; "" for none."""
    if line["effect"] is None:
        return ""
    digits = max(1, 1 - int(np.floor(np.log10(line["margin"]))))
    ends = [np.nan if x is None else x for x in line["effect"]]  # a record keeps NaN as null
    value, low, high = (f"{x:.{digits}f}".replace("-", "−") for x in ends)
    return f"{value} [{low}, {high}] {line['unit']}"


def together(lines, level=0.05):
    """The definite verdicts that stay if all of them may err once in 20 (Holm 1979): {part: stays}.

    For holds and the opposite the error is that nothing is there; for does not hold, that the effect is as
    large as the margin. Standard errors are read off the intervals.
    """
    chances, z = {}, stats.norm.ppf(0.975)
    for part, line in lines.items():
        if line["verdict"] in VERDICTS[:3]:
            value, low, high = line["effect"]
            missing = line["verdict"] == "does not hold"
            distance = line["margin"] - value if missing else abs(value)
            error = (high - value if missing or value < 0 else value - low) / z
            chances[part] = (
                (1 if missing else 2) * stats.norm.sf(distance / error) if error else 0.0
            )
    stays, ranks = {}, sorted(chances, key=chances.get)
    for i, part in enumerate(ranks):
        before = all(stays[other] for other in ranks[:i])
        stays[part] = bool(before and chances[part] <= level / (len(ranks) - i))
    return stays


def kept_runs(records):
    """{task: its runs} of a folder of records, none where there is no zip of them."""
    paths = {task: Path(records) / f"{task}.zip" for task in TASKS}
    return {task: runs.read(path)[0] if path.is_file() else [] for task, path in paths.items()}


def evidence(records, kept):
    """{part: `Found`, or in words why there is nothing yet} of a folder of records and its `kept_runs`."""
    records, found = Path(records), {}
    measures = {
        "1a": lambda: _of_long(kept, _dice),
        "1b": lambda: _of_long(kept, lambda *arms: 100 * np.array(runs.steps_saved([arms]))),
        "1c": lambda: _of_networks(kept, _phase),
        "1d": lambda: _of_networks(kept, lambda p: 100 * np.array(runs.steps_saved(p, "phase"))),
        "2a": lambda: _brightness(records),
        "2b": lambda: _brightness(records, "2CH minus 4CH"),
        "2c": lambda: _mirrored(records),
        "3a": lambda: worst_class(records),
        "3b": lambda: _phases(records),
        "4": lambda: contrast(records),
        "5a": lambda: _against_sdm(records, "right heart: correlation"),
        "5b": lambda: _against_sdm(records, "mitral valve: error avoided"),
        **{f"6{kind}": lambda kind=kind: _failures(kept, kind) for kind in "abc"},
    }
    for part, measure in measures.items():
        try:
            found[part] = measure()
        except (DiffEchoError, LookupError, TypeError) as reason:
            found[part] = f"runs not made yet ({reason})"
    return found


def arm(kept, task, name):
    """The runs of an arm; raises DiffEchoError for fewer than `LEAST`."""
    mine = [run for run in kept[task] if run["arm"] == name]
    if len(mine) < LEAST:
        raise DiffEchoError(f"{len(mine)} runs of {name}, {LEAST} are needed")
    return mine


def of_runs(effect, every, control=None):
    """`Found` of runs."""
    people, seeds = len(set(every[0]["patient"])), len({run["seed"] for run in every})
    made = results.shared([run["record"] for run in every])
    return Found(tuple(map(float, effect)), f"{people} patients, {seeds} seeds", made, control)


def _of_long(kept, measure):
    """Of text-seg frames added at the chosen length, and of augmentation at the same length."""
    mixed, real = (
        arm(kept, "segmentation", f"{name}, long") for name in ("real + 1 text-seg", "real")
    )
    try:
        still = arm(kept, "segmentation", "real, long, not augmented")
        control = tuple(map(float, measure(real, still)))
    except DiffEchoError:
        control = None
    return of_runs(measure(mixed, real), [*mixed, *real], control)


def _dice(ours, theirs):
    """Mean Dice of the three structures, in points."""
    scored = [
        [run | {"mean": np.nanmean(np.array(run["dice"], float), 1)[:, None]} for run in arm]
        for arm in (ours, theirs)
    ]
    return 100 * runs.paired_difference(*scored, "mean")[0]


def _of_networks(kept, measure):
    def pairs(first, second):
        names = [(f"{first}, {net}, long", f"{second}, {net}, long") for net in NETWORKS]
        return [tuple(arm(kept, "classification", name) for name in pair) for pair in names]

    mixed = pairs("real + text-seg", "real")
    try:
        control = tuple(map(float, measure(pairs("real", "every fourth"))))
    except DiffEchoError:
        control = None
    return of_runs(measure(mixed), [run for pair in mixed for arm in pair for run in arm], control)


def _phase(pairs):
    return 100 * np.array(runs.stratified_difference(pairs, "phase"))


def _record(records, name):
    path = records / f"{name}.json"
    if not path.is_file():
        raise DiffEchoError(f"no record {path.name}")
    return results.load(path)


def _brightness(records, contrast=None):
    """Darkness of the four classes' mean, or of 2CH beyond 4CH, in % of real."""
    record = _record(records, "03_unconditional")
    classes = list(record["values"]["brightness"].values())
    gaps = np.array([of["difference"] for of in classes])
    half = np.sqrt((np.ptp(gaps[:, 1:], axis=1) ** 2).sum()) / 2 / len(classes)
    dark = -gaps[:, 0].mean() + np.array([0, -half, half])
    if contrast:
        dark = -np.array(record["values"]["brightness_2ch_minus_4ch"])[[0, 2, 1]]
    real = np.mean([of["real"][0] for of in classes])
    n = f"{record['values']['counts']['a_class']} images a class"
    return Found(tuple((100 * dark / real).tolist()), n, record)


def _mirrored(records):
    record = _record(records, "03_unconditional")
    effect = 100 * np.array(record["values"]["mirrored"]["4CH-ES"]["difference"])
    return Found(tuple(effect.tolist()), f"{record['values']['counts']['a_class']} images", record)


def worst_class(records, encoder="classifier", named="2CH-ES"):
    """Excess of a class of text images over its floor, minus that of the worst other, in floors."""
    record = _record(records, "fid_analysis")
    rows, above = record["values"]["panel"][encoder]["text"], {}
    for kind in camus.CLASS_NAMES:
        mean = {score: of_runs[0] for score, of_runs in rows[kind].items()}
        mine = mean["distance"], mean["low"], mean["high"]
        above[kind] = intervals.minus(mine, (mean["floor"], mean["floor_low"], mean["floor_high"]))
    hardest = min(intervals.minus(above[named], above[kind]) for kind in above if kind != named)
    effect = np.array(hardest) / rows[named]["floor"][0]
    n = f"{rows[named]['n'][0]:.0f} images a class, {len(record['seeds'])} draws"
    return Found(tuple(effect.tolist()), n, record)


def _flips(records):
    """Mirrored images of two trainings, of the same seeds, in pairs."""
    trained = _record(records, "ablation_flips")["values"]["trained"]
    ways = [f"trained on, {way} flips" for way in ("with", "without")]
    on, off = (np.array(trained[way]["side_scores"]) < 0 for way in ways)
    return 100 * np.array(intervals.mean(on.astype(float) - off, range(len(on))))


def _phases(records):
    record = _record(records, "04_text_guided")
    pairs = record["values"]["phases"]["generated"]
    effect = 100 * np.array(pairs["cavity smaller at ES"]) - 50
    return Found(tuple(effect.tolist()), f"{pairs['pairs']} pairs of images", record)


def contrast(records, kind="spread"):
    """Contrast of text-seg minus that of the nearer of the two other modes, in % of real."""
    record = _record(records, "05_text_and_segmentation_guided")
    values = record["values"]
    gaps = [values["contrast_against"][f"{kind}, minus {x}"] for x in ("text", "unconditional")]
    effect = 100 * np.array(min(gaps)) / values["contrast"][kind]["given frames"][0]
    return Found(tuple(effect.tolist()), f"up to 100 of {values['images']} images a mode", record)


def _against_sdm(records, name):
    record = _record(records, "06_semantic_diffusion_baseline")
    values = record["values"]
    whole = values["valve"]["given"][0] / 100 if "valve" in name else 1
    effect = np.array(values["claim"][name]) / whole
    return Found(tuple(effect.tolist()), f"{values['images']} label maps, drawn by both", record)


def _failures(kept, kind):
    """Patients, in %, of whom a frame fails in this way; the runs read the same patients."""
    mine = arm(kept, "segmentation", "real + 1 text-seg, long")
    hits = np.array([[k == kind for k in failures(run["atrium"])] for run in mine])
    names, owner = np.unique(mine[0]["patient"], return_inverse=True)
    fails = np.stack([hits[:, owner == p].any(1) for p in range(len(names))], 1)
    effect = 100 * np.array(intervals.share(fails.ravel(), np.tile(range(len(names)), len(mine))))
    return of_runs(effect, mine)


def failures(atrium):
    """The paper's kind of failure of each frame, of `downstream.atrium_errors`: (N, 3) -> "a", "b", "c", "".

    a: more than half of the given atrium is read as cavity; b: else, more than a quarter as cavity or
    wall; c: else, more than half of what is read as atrium lies outside of it.
    """
    cavity, ventricle, outside = np.nan_to_num(np.array(atrium, dtype=float)).T
    return np.select([cavity > 0.5, ventricle > 0.25, outside > 0.5], ["a", "b", "c"], "")


def looks(records, kept):
    """Other ways of asking than the primary rows: a table of claim, look, unit, value, low, high."""
    records, rows = Path(records), []

    def add(claim, look, unit, measure):
        try:
            rows.append([claim, look, unit, *np.array(measure(), dtype=float).tolist()])
        except (DiffEchoError, LookupError, TypeError):
            rows.append([claim, f"{look}: not made yet", unit, *[np.nan] * 3])

    def of(task, measure, *names):
        return lambda: measure(*(arm(kept, task, name) for name in names))

    for dose in ("0.5", "1", "2"):
        names = f"real + {dose} text-seg", "real"
        add("1", f"{names[0]}, 1,000 steps", "Dice points", of("segmentation", _dice, *names))
    for look, *names in (
        ("nothing augmented", "real + 1 text-seg, not augmented", "real, not augmented"),
        ("the paper's recipe", "real + 1 text-seg, paper", "real, paper"),
        ("twice the steps", "real + 1 text-seg, epochs matched", "real, twice the steps"),
        ("three times the steps", "real + 1 text-seg, long", "real, long"),
        ("classical augmentation, 1,000 steps", "real", "real, not augmented"),
        ("twice the steps of real frames alone", "real, twice the steps", "real"),
        ("three times the steps of real frames alone", "real, long", "real"),
        *((f"SDM, {n} patients", f"{n} patients + sdm", f"{n} patients") for n in (25, 50, 100)),
    ):
        add("1", look, "Dice points", of("segmentation", _dice, *names))
    for model in ("unconditional", "text", "text-seg", "sdm"):
        one = of("classification", lambda *pair: _phase([pair]), f"real + {model}", "real")
        add("1", f"phase, small network, {model}", "% of frames", one)
    for net, arms in (
        *((f"{net}, stopped early", f"{{}}, {net}") for net in NETWORKS),
        ("EfficientNet-Lite0 with ImageNet's weights", "{}, all"),
    ):
        names = [arms.format(words) for words in ("real + text-seg", "real")]
        task = "pretrained" if "ImageNet" in net else "classification"
        add("1", f"phase, {net}", "% of frames", of(task, lambda *pair: _phase([pair]), *names))
    add(
        "2",
        "mirrored 4CH-ES: trained with flips minus without",
        "% of images",
        lambda: _flips(records),
    )
    for encoder in ("autoencoder", "clip"):
        add("3", f"2CH-ES by {encoder}", "floors", lambda e=encoder: worst_class(records, e).effect)
    add("4", "muscle minus blood", "% of real", lambda: contrast(records, "step").effect)
    return pd.DataFrame(rows, columns=["claim", "look", "unit", "value", "low", "high"])
