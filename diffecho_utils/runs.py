"""Records of runs: read them, summarise them, compare one arm with another.

Chapters 09 to 11. A run is what `downstream.segmentation_run` or `classification_run` returns, an arm
a list of runs that differ in their seed.
"""

import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from diffecho_utils import (
    DiffEchoError,
    assets,
    checkpoints,
    downstream,
    intervals,
    results,
    synthetic,
)


def read(source):
    """(runs, skipped): every run's values, and what was left out and why.

    source: a folder of records, as the experiments or `downstream --json` write, or the zip that
    `results.pack` made of it. Left out are records of another version of the package's runs, and
    files that are no records. Raises DiffEchoError if there is no such source, or a damaged one.
    """
    source, runs, skipped = Path(source), [], []
    if not source.exists():
        raise DiffEchoError(f"{source}: no such runs; restore the file from the repository")
    try:
        if source.is_dir():
            texts = {str(path): path.read_bytes() for path in sorted(source.glob("**/*.json"))}
        else:
            with zipfile.ZipFile(source) as archive:
                texts = {f"{source}/{name}": archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise DiffEchoError(
            f"{source}: damaged ({error}); restore the file from the repository"
        ) from None
    for name, text in texts.items():
        try:
            record = results.parse(text, name)
        except DiffEchoError as error:
            skipped.append(str(error))
            continue
        values = record["values"]  # of one run, or of those of a `downstream` command
        found, known = values.get("version"), downstream.RUN_VERSION
        if found == known:
            runs += [run | {"record": record} for run in values.get("runs", [values])]
        else:
            skipped.append(f"{name}: version {found}, this package reads {known}; run again")
    return runs, skipped


def outdated(runs):
    """A sentence that names whose frames, learned from by runs, other weights drew than are shipped now, or ""."""
    drew = {(made["model"], made["generator"]) for run in runs if (made := run["synthetic"])}
    shipped = {model: assets.checkpoint("camus", model) for model, _ in drew}
    now = {m: synthetic.digest(checkpoints.load_generator(at)) for m, at in shipped.items()}
    names = " and ".join(sorted({model for model, digest in drew if digest != now[model]}))
    text = "were drawn by earlier checkpoints than those shipped now, which other chapters describe"
    return f"*The frames of {names} {text}.*" if names else ""


def made(runs):
    """One line for a caption: where, when and with which commits runs of `read` were made."""
    return results.describe(results.shared([run["record"] for run in runs]))


def summary(runs):
    """One row an arm: mean over its runs and, as <name>_sd, their deviation; runs have an "arm".

    Of segmentation Dice of each structure, hd95 of each in pixels, ef_error, the mean absolute error
    of the EF in points over the patients where it could be measured, and their share, ef_measured;
    of classification the scores of each question. "runs" counts them.
    """
    rows = pd.DataFrame([{"arm": run["arm"]} | _means(run) for run in runs])
    groups = rows.groupby("arm", sort=False)
    return groups.mean().join(groups.std().add_suffix("_sd")).assign(runs=groups.size())


def _means(run):
    if run["task"] == "classification":
        return {f"{q}, {name}": v for q, s in run["scores"].items() for name, v in s.items()}
    row = {}
    for name, unit in (("dice", "Dice"), ("hd95", "hd95")):
        means = np.nanmean(np.array(run[name], dtype=float), 0)
        row |= {f"{unit}, {part}": m for part, m in zip(downstream.STRUCTURES, means, strict=True)}
    asked, seen = np.array(list(run["ef"].values()), dtype=float).T
    errors = np.abs(seen - asked)
    return row | {"ef_error": np.nanmean(errors), "ef_measured": np.isfinite(seen).mean()}


def over_seeds(arms, names, value):
    """{arm: (mean, lowest, highest)} of value(run) over the runs of each named arm.

    `arms`: {arm: its runs}; of chapters 09 and 10, for `plots.intervals`.
    """
    found = {name: [value(run) for run in arms[name]] for name in names}
    return {name: (np.mean(v), min(v), max(v)) for name, v in found.items()}


def told_apart(interval):
    """ "better", "worse" or "not told apart": where (difference, low, high) lies beside zero."""
    _, low, high = interval
    return "better" if low > 0 else "worse" if high < 0 else "not told apart"


def paired_difference(ours, theirs, score="dice"):
    """Mean of `ours` minus that of `theirs`, for each structure: (3, 3) value, low, high.

    ours, theirs: runs on the same test frames; score: of each frame (F, structures), NaN left out. The
    interval (`intervals.crossed`) is over patients and runs; where both arms have the same seeds, whose
    runs begin with the same weights, the runs are taken in pairs. Raises DiffEchoError if the test frames
    differ.
    """

    def count(run):
        values = np.array(run[score], dtype=float)
        known = np.isfinite(values)
        return np.stack([np.where(known, values, 0), known], -1)

    return np.column_stack(_difference([(ours, theirs)], count, lambda x: x[..., 0] / x[..., 1]))


def classification_difference(ours, theirs, question="class", score="accuracy"):
    """As `paired_difference`, of an "accuracy" or a macro "f1": (value, low, high)."""
    return stratified_difference([(ours, theirs)], question, score)


def stratified_difference(pairs, question="class", score="accuracy"):
    """The mean over networks of `classification_difference`; pairs: (ours, theirs) of each network.

    The networks are these and no others: only patients and runs are drawn.
    """
    return _difference(pairs, lambda run: _answers(run, question), lambda x: _scored(x, score))


def _difference(pairs, count, score):
    """(value, low, high) of score(ours) - score(theirs), mean over pairs of arms."""
    every = [run for pair in pairs for arm in pair for run in arm]
    if len({tuple(zip(run["patient"], run["class"], strict=True)) for run in every}) != 1:
        raise DiffEchoError("these runs were scored on different frames; compare like with like")
    tables, weights, share = [], [], 1 / len(pairs)
    for pair in pairs:
        arms = [sorted(arm, key=lambda run: run["seed"]) for arm in pair]
        seeds = [[run["seed"] for run in arm] for arm in arms]
        first, second = (_table(arm, count, score) for arm in arms)
        same = seeds[0] == seeds[1]
        tables += [first - second] if same else [first, second]
        weights += [share] if same else [share, -share]
    return intervals.crossed(tables, weights)


def _table(arm, count, score):
    """What each patient adds to each run's score: (runs, patients, ...), whose mean is the score.

    By leaving patients out one at a time; `count` makes of a run an array (F, ...), `score` of its sums
    over frames a score.
    """
    sums = _of_patients(np.stack([count(run) for run in arm]), arm[0]["patient"])
    whole, patients = sums.sum(1, keepdims=True), sums.shape[1]
    with np.errstate(invalid="ignore", divide="ignore"):
        without = score(whole - sums)
        beyond = (patients - 1) * (without.mean(1, keepdims=True) - without)
        return score(whole) + (beyond if patients > 1 else 0)


def _of_patients(table, patients):
    """Sums over the frames of each patient: (runs, frames, ...) -> (runs, patients, ...)."""
    names, owner = np.unique(patients, return_inverse=True)
    return np.stack([table[:, owner == p].sum(1) for p in range(len(names))], 1)


def steps_saved(pairs, question=None):
    """Share of their steps that runs save to 99 % of the lower arm's mean last score: (value, low, high).

    pairs: (ours, theirs) of each network, each with a target of its own; runs of one seed are compared
    (`intervals.ratio`), and a run that does not get there counts with all its steps. Patients are not
    drawn, since a curve is a mean over all of them. question: as in `steps_to`. Raises DiffEchoError if
    the arms of a pair have not the same seeds.
    """
    steps = [], []
    for pair in pairs:
        arms = [sorted(arm, key=lambda run: run["seed"]) for arm in pair]
        seeds = [[run["seed"] for run in arm] for arm in arms]
        if seeds[0] != seeds[1]:
            raise DiffEchoError(
                f"runs with seeds {seeds[0]} and {seeds[1]}; run both with the same"
            )
        target = 0.99 * min(np.mean([_curve(run, question)[1][-1] for run in arm]) for arm in arms)
        for mine, arm in zip(steps, arms, strict=True):
            mine += [min(steps_to(run, target, question), run["steps"]) for run in arm]
    value, low, high = intervals.ratio(*steps)
    return 1 - value, 1 - high, 1 - low


def steps_to(run, threshold, question=None):
    """First step of a run's curve that reaches `threshold`, between its points by a line; or inf.

    Of segmentation the mean Dice, of classification the accuracy of a question.
    """
    steps, scores = _curve(run, question)
    above = np.flatnonzero(scores >= threshold)
    if not len(above):
        return np.inf
    around = slice(max(above[0] - 1, 0), above[0] + 1)
    return float(np.interp(threshold, scores[around], steps[around]))


def _curve(run, question):
    curve = np.array(run["curve"])
    if question is None:
        return curve[:, 0], curve[:, 1:].mean(1)
    return curve[:, 0], curve[:, 1 + downstream.QUESTIONS.index(question)]


def classification_confusion(run, question="class"):
    """How often each answer was given to each truth, of each patient: (P, K, K), truth in rows."""
    return _of_patients(_answers(run, question)[None], run["patient"])[0]


def _answers(run, question):
    """The cell of the confusion table that each frame falls into: (N, K, K), truth in rows."""
    chances, truth = downstream.classification_questions(
        torch.tensor(run["probabilities"], dtype=torch.float64), torch.tensor(run["class"])
    )[question]
    cells = np.eye(chances.shape[1])
    return cells[truth][:, :, None] * cells[chances.argmax(1)][:, None]


def _scored(confusion, score):
    """Accuracy, or f1 (2 hits / (given + true), mean over answers), of (..., K, K), truth in rows."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    if score == "accuracy":
        return hits.sum(-1) / confusion.sum((-2, -1))
    both = confusion.sum(-2) + confusion.sum(-1)
    return (2 * hits / np.maximum(both, 1)).mean(-1)


def classification_reliability(probabilities, truth, bins=10):
    """What frames of like certainty deserve: a table of certainty, accuracy and frames, one row a bin.

    probabilities: (N, K), truth: (N,), arrays; certainty is that of the likeliest answer; bins of
    equal width in [0, 1], empty ones left out (Guo et al. 2017).
    """
    certainty, hit = probabilities.max(1), probabilities.argmax(1) == truth
    place = np.minimum((certainty * bins).astype(int), bins - 1)
    rows = pd.DataFrame({"bin": place, "certainty": certainty, "accuracy": hit.astype(float)})
    groups = rows.groupby("bin")
    return groups.mean().assign(frames=groups.size())
