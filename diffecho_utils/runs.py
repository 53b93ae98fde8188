"""Records of runs: read them, summarise them, compare one arm with another.

Chapters 09 to 11. A run is what `downstream.segmentation_run` or `classification_run` returns, an arm a list of
runs that differ in their seed.
"""

import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from diffecho_utils import DiffEchoError, downstream, results


def read(source):
    """(runs, skipped): every run's values, and what was left out and why.

    source: a folder of records, as the experiments or `downstream --json` write, or the zip that
    `results.pack` made of it. Left out are records of another version of the package's runs, and
    files that are no records. Raises DiffEchoError if there is no such source, or a damaged one.
    """
    source, texts = Path(source), {}
    if source.is_dir():
        texts = {str(path): path.read_bytes() for path in sorted(source.glob("**/*.json"))}
    elif source.is_file():
        try:
            with zipfile.ZipFile(source) as archive:
                texts = {f"{source}/{name}": archive.read(name) for name in archive.namelist()}
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise DiffEchoError(
                f"{source}: damaged ({error}); restore the file from the repository"
            ) from None
    else:
        raise DiffEchoError(f"{source}: no such runs; restore the file from the repository")
    runs, skipped = [], []
    for name, text in texts.items():
        try:
            record = results.parse(text, name)
        except DiffEchoError as error:
            skipped.append(str(error))
            continue
        found = record["values"].get("version")
        if found != downstream.RUN_VERSION:
            skipped.append(
                f"{name}: version {found}, this package reads {downstream.RUN_VERSION}; run again"
            )
            continue
        values = record["values"]  # of one run, or of those of a `downstream` command
        runs += [run | {"record": record} for run in values.get("runs", [values])]
    return runs, skipped


def made(runs):
    """One line for a caption: where, when and with which commits runs of `read_runs` were made."""
    return results.describe(results.shared([run["record"] for run in runs]))


def summary(runs):
    """One row an arm: mean over its runs and, as <name>_sd, their deviation; runs have an "arm".

    Of segmentation Dice of each structure, hd95 of each in pixels, ef_error, the mean absolute error
    of the EF in points over the patients where it could be measured, and their share, ef_measured;
    of classification the scores of each question. "runs" counts them.
    """
    groups = pd.DataFrame([{"arm": run["arm"]} | _means(run) for run in runs]).groupby(
        "arm", sort=False
    )
    found = groups.mean().join(groups.std().add_suffix("_sd"))
    return found.assign(runs=groups.size())


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


def paired_difference(ours, theirs, score="dice", repeats=1000):
    """Mean of `ours` minus that of `theirs`, for each structure: (3, 3) value, low, high.

    ours, theirs: runs on the same test frames. 95 % bootstrap interval: in each repeat patients are
    drawn, the same for both, and of both the runs. Raises DiffEchoError if the test frames differ.
    """
    _check_same_frames([*ours, *theirs])
    scores = [np.array([run[score] for run in runs], dtype=float) for runs in (ours, theirs)]
    names, patients = np.unique(ours[0]["patient"], return_inverse=True)
    # (runs, patients, structures): sums and counts of the frames that have a score
    parts = [
        np.stack([values[:, patients == p].sum(1) for p in range(len(names))], 1)
        for table in scores
        for values in (np.nan_to_num(table), np.isfinite(table))
    ]
    rng = np.random.default_rng(0)

    def gap(runs, drawn):
        sums = [part[runs[i // 2]][:, drawn].sum((0, 1)) for i, part in enumerate(parts)]
        return sums[0] / sums[1] - sums[2] / sums[3]

    value = gap([slice(None)] * 2, slice(None))
    draws = [
        gap(
            [rng.integers(len(table), size=len(table)) for table in scores],
            rng.integers(len(names), size=len(names)),
        )
        for _ in range(repeats)
    ]
    return np.column_stack([value, *np.quantile(draws, [0.025, 0.975], axis=0)])


def steps_to(run, threshold):
    """First step of a run's curve whose mean Dice reaches `threshold`, between points by a line; inf."""
    steps, scores = np.array(run["curve"])[:, 0], np.array(run["curve"])[:, 1:].mean(1)
    above = np.flatnonzero(scores >= threshold)
    if not len(above):
        return np.inf
    first = above[0]
    if first == 0:
        return float(steps[0])
    share = (threshold - scores[first - 1]) / (scores[first] - scores[first - 1])
    return float(steps[first - 1] + share * (steps[first] - steps[first - 1]))


def classification_confusion(run, question="class"):
    """How often each answer was given to each truth, of each patient: (P, K, K), truth in rows."""
    chances, truth = downstream.classification_questions(
        torch.tensor(run["probabilities"], dtype=torch.float64), torch.tensor(run["class"])
    )[question]
    patients = np.unique(run["patient"], return_inverse=True)[1]
    counts = np.zeros((patients.max() + 1, chances.shape[1], chances.shape[1]))
    np.add.at(counts, (patients, truth.numpy(), chances.argmax(1).numpy()), 1)
    return counts


def classification_difference(ours, theirs, question="class", score="accuracy", repeats=1000):
    """Mean of `ours` minus that of `theirs`: (value, low, high); score: "accuracy" or macro "f1".

    ours, theirs: runs on the same test frames. 95 % bootstrap interval: in each repeat patients are
    drawn, the same for both, and of both the runs. Raises DiffEchoError if the test frames differ.
    """
    _check_same_frames([*ours, *theirs])
    tables = [np.stack([classification_confusion(r, question) for r in s]) for s in (ours, theirs)]
    rng, measure = np.random.default_rng(0), {"accuracy": _accuracy, "f1": _macro_f1}[score]

    def gap(runs, patients):
        first, second = (
            measure(table[rows][:, patients].sum(1)).mean()
            for table, rows in zip(tables, runs, strict=True)
        )
        return first - second

    n = tables[0].shape[1]
    draws = [
        gap([rng.integers(len(t), size=len(t)) for t in tables], rng.integers(n, size=n))
        for _ in range(repeats)
    ]
    value = gap([slice(None)] * 2, slice(None))
    return float(value), *(float(end) for end in np.quantile(draws, [0.025, 0.975]))


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


def classification_steps_to(run, threshold, question="class"):
    """First step of a run's curve that reaches an accuracy, as `steps_to`: a number of steps or inf."""
    column = 1 + ("class", "view", "phase").index(question)
    return steps_to({"curve": np.array(run["curve"])[:, [0, column]]}, threshold)


def _check_same_frames(runs):
    frames = {tuple(zip(run["patient"], run["class"], strict=True)) for run in runs}
    if len(frames) != 1:
        raise DiffEchoError("these runs were scored on different frames; compare like with like")


def _means(run):
    if run["task"] == "classification":
        return {f"{q}, {name}": v for q, s in run["scores"].items() for name, v in s.items()}
    row = {}
    for name, unit in (("dice", "Dice"), ("hd95", "hd95")):
        means = np.nanmean(np.array(run[name], dtype=float), 0)
        row |= {f"{unit}, {part}": m for part, m in zip(downstream.STRUCTURES, means, strict=True)}
    asked, read = np.array(list(run["ef"].values()), dtype=float).T
    errors = np.abs(read - asked)
    return row | {"ef_error": np.nanmean(errors), "ef_measured": np.isfinite(read).mean()}


def _accuracy(confusion):
    """(..., K, K), truth in rows -> (...)."""
    return np.trace(confusion, axis1=-2, axis2=-1) / confusion.sum((-2, -1))


def _macro_f1(confusion):
    """2 hits / (given + true) of each answer, mean over answers: (..., K, K) -> (...)."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    both = confusion.sum(-2) + confusion.sum(-1)
    return (2 * hits / np.maximum(both, 1)).mean(-1)
