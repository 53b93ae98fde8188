"""Do the book's 95 % intervals hold the truth in 95 of 100 experiments? Each kind, simulated.

Every row is one kind of `diffecho_utils.intervals` at a size of the book's own: experiments are drawn whose
truth is known, with what the recorded runs of chapters 09 and 10 and the shipped features of chapters 03 and
08 vary by, and counted is how often the interval holds the truth, and how often it lies below or above. The
truth of a distance is what is expected of that number of rows: its mean over the experiments. Of --data only
the name is read. Half an hour on one core.
"""

import numpy as np
from safetensors.numpy import load_file
from world import kept

from diffecho_utils import assets, intervals, runs

SEEDS, SPLIT = [0], "validation"
PATIENTS, FRAMES = 50, 4
OWNERS = np.repeat(np.arange(PATIENTS), FRAMES)
DICE, PHASE = (
    ("segmentation", "real + 1 text-seg", "real"),
    ("classification", "real + text-seg", "real"),
)
LONG, PAPER = ([DICE[0], *(f"{arm}, {word}" for arm in DICE[1:])] for word in ("long", "paper"))


def rows(world, experiments=1000):
    named = {
        "mean, 50 patients x 4 frames, recorded errors": {"kind": "mean"},
        "mean, 50 patients x 4 frames, skewed errors": {"kind": "mean", "skewed": True},
    }
    for runs_, title, arms in (
        (5, "Dice", DICE),
        (3, "Dice", DICE),
        (5, "Dice, long", LONG),
        (5, "Dice, paper", PAPER),
        (5, "phase", PHASE),
        (3, "phase", PHASE),
    ):
        named[f"difference, {runs_} runs, {title}"] = {
            "kind": "two_way",
            "size": runs_,
            "arms": arms,
        }
    more = {"kind": "two_way", "size": 3, "arms": PHASE}
    named["difference, 3 and 3 runs of other seeds, phase"] = more | {"paired": False}
    named["difference, 2 networks x 3 runs, phase"] = more | {"networks": 2}
    for pairs in (3, 5):
        named[f"ratio of steps, {pairs} pairs of runs"] = {"kind": "ratio", "size": pairs}
    for share in (0.02, 0.1, 0.5, 0.98):
        named[f"share {share:g}, 50 images"] = {"kind": "share", "share": share}
        named[f"share {share:g}, 50 patients x 5 runs"] = {"kind": "clustered", "share": share}
    named["difference of shares, 51 and 50 images"] = {"kind": "shares", "both": (0.18, 0.08)}
    named["correlation, 50 patients x 4 frames"] = {"kind": "correlation"}
    for encoder in ("classifier", "autoencoder", "clip"):
        settings = {"kind": "distance", "encoder": encoder, "patients": 50}
        named[f"distance, 50 images, {encoder}"] = settings
    settings = {"kind": "distance", "encoder": "classifier"}
    named["distance, 50 images as good as real, classifier"] = settings | {"patients": 50, "far": 0}
    named["distance, 25 patients x 4 frames, classifier"] = settings | {"patients": 25, "each": 4}
    named["difference of distances, 50 maps, classifier"] = settings | {"patients": 50, "two": True}
    return {row: of | {"experiments": experiments} for row, of in named.items()}


def compute(world, kind, experiments, **of):
    trial, truth = globals()[kind](**of)
    rng = np.random.default_rng(SEEDS[0])
    value, low, high = np.array([trial(rng) for _ in range(experiments)], dtype=float).T
    truth = value.mean() if truth is None else truth
    missed = {"below": (high < truth).mean(), "above": (low > truth).mean()}
    facts = {"truth": truth, "width": (high - low).mean(), "experiments": experiments}
    return {"held": 1 - sum(missed.values())} | missed | facts


def collect(world, found):
    return {"coverage": found}


@kept
def arms():
    """{task: {arm: its runs}} of the shipped records."""
    found = {}
    for task in ("segmentation", "classification"):
        for run in runs.read(assets.shipped(f"results/camus/cpu/{task}.zip"))[0]:
            found.setdefault(task, {}).setdefault(run["arm"], []).append(run)
    return found


def of_patients(run):
    """A run's mean Dice, or share of phases recognised, of each patient: (patients,)."""
    if run["task"] == "segmentation":
        scores = np.nanmean(np.array(run["dice"], dtype=float), 1)
    else:
        scores = np.array(run["probabilities"]).argmax(1) % 2 == np.array(run["class"]) % 2
    return scores.reshape(PATIENTS, -1).mean(1)


def mean(skewed=False):
    """Recorded Dice errors of the atrium, patients drawn; or log-normal ones with some twice as large."""
    errors = 1 - np.array(arms()["segmentation"]["real"][0]["dice"], dtype=float)[:, 2]
    errors = np.nan_to_num(errors, nan=np.nanmean(errors)).reshape(PATIENTS, FRAMES)
    spread = np.log(errors.mean(1)).std()

    def trial(rng):
        drawn = errors[rng.integers(PATIENTS, size=PATIENTS)]
        if skewed:
            doubled = 1 + (rng.random((PATIENTS, 1)) < 0.05)
            drawn = doubled * np.exp(spread * rng.normal(size=(PATIENTS, 1)))
            drawn = drawn * np.exp(0.3 * rng.normal(size=(PATIENTS, FRAMES)))
        return intervals.mean(drawn.ravel(), OWNERS)

    return trial, 1.05 * np.exp((spread**2 + 0.3**2) / 2) if skewed else errors.mean()


def two_way(size, arms, paired=True, networks=1):
    """Differences of two arms: recorded patients, normal runs and rest of the recorded variances."""
    first, second = (np.array([of_patients(run) for run in found(arms[0], a)]) for a in arms[1:])
    parts = [components(first - second)] if paired else [components(first), components(second)]
    effects = (first - second).mean(0)
    weights = [1 / networks] * networks if paired else [1, -1]

    def trial(rng):
        picked = effects[rng.integers(PATIENTS, size=PATIENTS)]
        tables = []
        for i in range(len(weights)):
            among, rest = parts[i % len(parts)]
            luck = among * rng.normal(size=(size, 1)) + rest * rng.normal(size=(size, PATIENTS))
            tables.append(luck + (picked if paired or i == 0 else 0))
        return intervals.crossed(tables, weights)

    return trial, effects.mean()


def found(task, arm):
    return sorted(arms()[task][arm], key=lambda run: run["seed"])


def components(table):
    """Standard deviations of runs and of the rest in a table (runs, patients)."""
    size, patients = table.shape
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    chance = (rest**2).sum() / ((size - 1) * (patients - 1))
    return max(table.mean(1).var(ddof=1) - chance / patients, 0) ** 0.5, chance**0.5


def ratio(size):
    """Steps a fifth fewer; a seed slow in one arm is so in the other."""

    def trial(rng):
        seeds = 300 * np.exp(0.2 * rng.normal(size=size))
        return intervals.ratio(*(seeds * f * np.exp(0.1 * rng.normal(size=size)) for f in (0.8, 1)))

    return trial, 0.8


def share(share):
    return lambda rng: intervals.share(rng.random(PATIENTS) < share), share


def clustered(share):
    """Each patient has a chance of its own, which five runs try."""
    owners = np.repeat(np.arange(PATIENTS), 5)

    def trial(rng):
        chances = rng.beta(2 * share, 2 * (1 - share), size=PATIENTS)
        return intervals.share(rng.random(len(owners)) < chances[owners], owners)

    return trial, share


def shares(both):
    def trial(rng):
        found = [intervals.share(rng.random(n) < p) for n, p in zip((51, 50), both, strict=True)]
        return intervals.minus(*found)

    return trial, both[0] - both[1]


def correlation():
    """Patients' and frames' parts of two measures correlate by one half."""

    def trial(rng):
        normal = rng.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], size=(2, len(OWNERS)))
        x, y = (normal[0] + normal[1][OWNERS]).T
        return intervals.bootstrap(lambda rows: np.corrcoef(x[rows], y[rows])[0, 1], OWNERS)

    return trial, 0.5


@kept
def known(encoder):
    """Mean (D,) and a root (D, D) of the covariance of the training frames' shipped features."""
    place = "03_features" if encoder == "autoencoder" else "08_features"
    file = load_file(assets.features("camus", "cpu", place))
    if encoder == "clip":
        return file["clip_mean"].astype(float), file["clip_root"].astype(float)
    features = file["features"][file["split"] == 0].astype(float)
    values, vectors = np.linalg.eigh(np.cov(features.T))
    return features.mean(0), np.sqrt(np.maximum(values, 0))[:, None] * vectors.T


def to_known(x, mean, root):
    """rows -> `metrics.frechet_distance` of x[rows] to a Gaussian, by the smaller of two eigenvalue problems."""
    seen, spread = x @ root.T, (root**2).sum()

    def frechet(rows):
        mine, both = x[rows], seen[rows] - seen[rows].mean(0)
        both = both @ both.T if len(both) < len(root) else both.T @ both
        overlap = np.sqrt(np.maximum(np.linalg.eigvalsh(both / (len(mine) - 1)), 0)).sum()
        apart = ((mine.mean(0) - mean) ** 2).sum()
        return apart + mine.var(0, ddof=1).sum() + spread - 2 * overlap

    return frechet


def distance(encoder, patients, each=1, far=0.3, two=False):
    """Normal features of the training frames' covariance, less spread and `far` of their spread aside.

    each: frames of a patient, which share half of their variance; two: of two generators, the second
    half as far as the first, drawn to the same maps, which decide half of the variance.
    """
    mean, root = known(encoder)
    owners, scale = np.repeat(np.arange(patients), each), 0.8 if far else 1.0
    aside = np.random.default_rng(1).normal(size=len(root)) @ root
    aside *= far * np.linalg.norm(root) / np.linalg.norm(aside)

    def trial(rng):
        def normal(count):
            return scale * rng.normal(size=(count, len(root))) @ root

        common = normal(patients)[owners] / 2**0.5
        if each == 1 and not two:
            x = mean + aside + normal(patients)
        else:
            x = mean + aside + common + normal(len(owners)) / 2**0.5
        if not two:
            return intervals.distance(to_known(x, mean, root), owners)
        y = mean + aside / 2 + common + normal(len(owners)) / 2**0.5
        first, second = (to_known(z, mean, root) for z in (x, y))
        return intervals.distance(lambda r: first(r) - second(r), owners, positive=False)

    return trial, None
