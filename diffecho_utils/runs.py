"""Records of runs: read them, summarise them, compare one arm with another.

Chapters 09 to 11. A run is what `downstream.segmentation_run` or `classification_run` returns, an arm
a list of runs that differ in their seed.
"""

import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from diffecho_utils import DiffEchoError, downstream, metrics, results


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


def paired_difference(ours, theirs, score="dice", repeats=1000):
    """Mean of `ours` minus that of `theirs`, for each structure: (3, 3) value, low, high.

    ours, theirs: runs on the same test frames. 95 % bootstrap interval: in each repeat patients are
    drawn, the same for both, and of both the runs. Raises DiffEchoError if the test frames differ.
    """
    tables = []
    for runs in (ours, theirs):
        values = np.array([run[score] for run in runs], dtype=float)  # (runs, frames, structures)
        known = np.isfinite(values)
        tables.append(np.stack([np.where(known, values, 0), known], -1))

    def mean(table):
        sums, counts = np.moveaxis(table.sum((0, 1)), -1, 0)
        return sums / counts

    return np.column_stack(_difference(ours, theirs, tables, mean, repeats))


def classification_difference(ours, theirs, question="class", score="accuracy", repeats=1000):
    """As `paired_difference`, of an "accuracy" or a macro "f1": (value, low, high)."""
    tables = [[_answers(run, question) for run in runs] for runs in (ours, theirs)]

    def mean(table):
        return _scored(table.sum(1), score).mean()

    return _difference(ours, theirs, map(np.stack, tables), mean, repeats)


def _difference(ours, theirs, tables, mean, repeats):
    """(value, low, high) of mean(our table) - mean(their table), each (runs, frames, ...)."""
    frames = {tuple(zip(run["patient"], run["class"], strict=True)) for run in [*ours, *theirs]}
    if len(frames) != 1:
        raise DiffEchoError("these runs were scored on different frames; compare like with like")
    first, second = (_of_patients(table, ours[0]["patient"]) for table in tables)

    def gap(patients, our_runs, their_runs):
        return mean(first[our_runs][:, patients]) - mean(second[their_runs][:, patients])

    everything, sizes = slice(None), (len(ours), len(theirs))
    ends = metrics.bootstrap_interval(gap, range(first.shape[1]), repeats, sizes, centred=False)
    return gap(everything, everything, everything).tolist(), *ends


def _of_patients(table, patients):
    """Sums over the frames of each patient: (runs, frames, ...) -> (runs, patients, ...)."""
    names, owner = np.unique(patients, return_inverse=True)
    return np.stack([table[:, owner == p].sum(1) for p in range(len(names))], 1)


def steps_to(run, threshold, question=None):
    """First step of a run's curve that reaches `threshold`, between its points by a line; or inf.

    Of segmentation the mean Dice, of classification the accuracy of a question.
    """
    curve = np.array(run["curve"])
    steps, scores = curve[:, 0], curve[:, 1:].mean(1)
    if question is not None:
        scores = curve[:, 1 + downstream.QUESTIONS.index(question)]
    above = np.flatnonzero(scores >= threshold)
    if not len(above):
        return np.inf
    around = slice(max(above[0] - 1, 0), above[0] + 1)
    return float(np.interp(threshold, scores[around], steps[around]))


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
