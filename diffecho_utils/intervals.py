"""Every 95 % interval of the book: of means, shares, ratios, differences and distances.

Chapters 02 to 11. Frames of one patient are not independent, so patients are what is resampled; of trained
networks the runs vary as well. `experiments/coverage.py` tries each kind on simulated experiments of
the book's own sizes. All return (value, low, high); the ends are NaN where there are too few patients.
"""

import numpy as np
from scipy import stats

LEVEL = 0.95
TAILS = np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2])


def mean(values, groups):
    """Mean of values (N,), NaN left out, over the patients `groups` (N,) that they are of."""
    values, groups = np.asarray(values, dtype=float), np.asarray(groups)
    there = np.isfinite(values)
    member = np.unique(groups[there], return_inverse=True)[1]
    value, counts = values[there].mean(), np.bincount(member)
    beyond = np.bincount(member, values[there] - value) / counts.mean()
    return crossed([value + beyond[None]])


def crossed(tables, weights=(1.0,)):
    """Weighted sum of the means of `tables`, each (runs, patients, ...); they share patients, not runs.

    Patients and runs are both drawn at random: the variance of the sum is that of the patients' sums, plus
    what the runs of each table differ by beyond chance. t quantiles with Satterthwaite's degrees of freedom
    (1946), moved by the patients' skewness (Hall 1992). Of a single run only the patients are in it.
    """
    tables = [np.asarray(table, dtype=float) for table in tables]
    of_patients = sum(w * table.mean(0) for w, table in zip(weights, tables, strict=True))
    patients = len(of_patients)
    among = of_patients.var(0, ddof=min(1, patients - 1)) / patients
    variance, doubt = among, among**2 / max(patients - 1, 1)
    for weight, table in zip(weights, tables, strict=True):
        runs, of_runs = len(table), table.mean(1)
        if runs > 1 and patients > 1:
            rest = table - of_runs[:, None] - table.mean(0) + of_runs.mean(0)
            chance = (rest**2).sum((0, 1)) / ((runs - 1) * (patients - 1) * runs * patients)
            seen = of_runs.var(0, ddof=1) / runs
            variance = variance + weight**2 * np.maximum(seen - chance, 0)
            doubt = doubt + weight**4 * seen**2 / (runs - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        freedom = np.where(variance > 0, variance**2 / doubt, 1 if patients > 1 else np.nan)
        skew = (
            stats.skew(of_patients, bias=False) if patients >= 10 else 0.0
        )  # fewer do not show it
        skew = np.where(variance > 0, skew * (among / variance) ** 1.5 / patients**0.5, 0.0)
    return _ends(of_patients.mean(0), variance**0.5, freedom, skew)


def _ends(value, error, freedom, skew):
    """Hall's cubic transformation of t, whose inverse is asked for; near zero skewness it is t itself."""
    ends = []
    for tail in TAILS[::-1]:
        t = stats.t.ppf(tail, freedom)
        small = np.abs(skew) < 1e-3
        by = np.where(small, 1, skew)
        moved = 3 / by * (np.cbrt(1 + by * (t - by / 6)) - 1)
        ends.append(value - error * np.where(small, t, moved))
    return tuple(np.asarray(x).tolist() for x in (value, *ends))


def share(hits, groups=None):
    """Share of hits (N,) bool or 0 to 1: Wilson's interval (1927).

    groups: (N,) the patient of each; then N is divided by the design effect, as if there were as many
    independent hits as give the variance seen between patients, at least one a patient if none varies.
    """
    hits = np.asarray(hits, dtype=float)
    value, n, z = float(hits.mean()), len(hits), stats.norm.ppf(TAILS[1])
    if groups is not None:
        member = np.unique(groups, return_inverse=True)[1]
        patients, expected = member.max() + 1, value * (1 - value)
        beyond = np.bincount(member, hits - value) * patients / n
        variance = (beyond**2).sum() / (patients * max(patients - 1, 1))
        n = np.clip(expected / variance, 1, n) if variance > 0 else patients
        z = stats.t.ppf(TAILS[1], max(patients - 1, 1))
    centre = value + z**2 / (2 * n)
    width = z * np.sqrt(value * (1 - value) / n + z**2 / (4 * n**2))
    low, high = np.clip((centre + np.array([-width, width])) / (1 + z**2 / n), 0, 1)
    return value, float(low) if value > 0 else 0.0, float(high) if value < 1 else 1.0


def minus(a, b):
    """Difference of two independent (value, low, high), none of which need be symmetric.

    The method of variance estimates recovery (Zou and Donner 2008); of shares, Newcombe's (1998).
    """
    value, below = a[0] - b[0], np.hypot(a[0] - a[1], b[2] - b[0])
    return value, value - below, value + np.hypot(a[2] - a[0], b[0] - b[1])


def ratio(ours, theirs):
    """Geometric mean of the ratios of pairs, ours (R,) over theirs (R,), by t on their logarithms."""
    logs = np.log(np.asarray(ours, dtype=float) / np.asarray(theirs, dtype=float))
    return tuple(np.exp(crossed([logs[None]])).tolist())


def bootstrap(statistic, groups, repeats=200):
    """Any statistic(rows), a number or an array, of patients drawn with replacement.

    groups: (N,) the patient of each row. Percentiles, the farther out the fewer the patients (Hesterberg
    2015), moved so that the resamples' mean falls on the statistic of all.
    """
    rng, rows_of = np.random.default_rng(0), _rows(groups)
    n, value = len(rows_of), statistic(np.arange(len(groups)))
    picks = rng.integers(n, size=(repeats, n))
    found = np.array([statistic(np.concatenate([rows_of[i] for i in pick])) for pick in picks])
    t = stats.t.ppf(TAILS, max(n - 1, 1)) * np.sqrt(n / max(n - 1, 1))
    ends = np.nanquantile(found, stats.norm.cdf(t), axis=0) + value - np.nanmean(found, axis=0)
    return tuple(np.asarray(x).tolist() for x in (value, *ends))


def distance(statistic, groups, positive=True, halves=60):
    """A statistic(rows) that small samples raise, as they do a Frechet distance, over patients `groups` (N,).

    The interval is for what is expected of *this* number of rows. With every patient (or of more than 50
    each fiftieth part of them) left out once, the spread counts chance that is quadratic in the deviations
    twice (Efron and Stein 1981), halves of the patients, drawn without replacement, three times. So the
    first variance is raised by half of what it exceeds the second by, or lowered, to half of it at most;
    where chance is all there is, that errs on the safe side. positive: reckoned on logarithms, so that no end
    lies below zero; else, as for a difference of two distances, as it is.
    """
    rng, rows_of = np.random.default_rng(0), _rows(groups)
    n, value = len(rows_of), float(statistic(np.arange(len(groups))))
    if n < 4:
        return value, np.nan, np.nan

    def spread(parts):
        kept = (np.concatenate([rows_of[i] for i in part]) for part in parts)
        return np.var([statistic(rows) for rows in kept])

    parts = np.array_split(rng.permutation(n), min(n, 50))
    jackknife = (len(parts) - 1) * spread([np.setdiff1d(np.arange(n), part) for part in parts])
    by_halves = (
        spread([rng.permutation(n)[: n // 2] for _ in range(halves)]) * (n // 2) / (n - n // 2)
    )
    error = np.sqrt(max(1.5 * jackknife - by_halves / 2, jackknife / 2))
    reach = stats.t.ppf(TAILS, len(parts) - 1) * error
    ends = value * np.exp(reach / value) if positive else value + reach
    return value, *ends.tolist()


def _rows(groups):
    """The rows of each patient."""
    member = np.unique(np.asarray(groups), return_inverse=True)[1]
    return np.split(np.argsort(member, kind="stable"), np.cumsum(np.bincount(member))[:-1])
