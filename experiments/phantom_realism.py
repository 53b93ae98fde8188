"""How much the phantom is like CAMUS: statistics side by side, and segmenters that saw the phantom alone.

Rows: `measure`, the statistics; and a segmenter for each setting and seed, trained on the phantom with all its
ingredients, with one left out, with none, and on real training patients, all tested on real validation patients.
Both worlds are stretched to squares of 128 pixels, as the public re-pack of CAMUS was: shares of the picture
survive that, millimetres do not. Chapter 01 shows it. 10 minutes on two cores.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from scipy import ndimage, stats
from world import QUIET, by_structure, cached, dice_of, kept

from diffecho_utils import anatomy, camus, data, downstream, metrics, phantom, results

SEEDS, SPLIT = [0], "statistics: all patients; segmenter: tested on validation"
SQUARE = data.Geometry(128, stretched=True)
BINS = 32  # of the grey values 0 to 255
WINDOW = 4  # pixels: sd of the Gaussian that separates speckle from what varies slowly
COMMAND = "python experiments/run.py phantom_realism --data camus"
# Ingredients of the phantom to train on; None stands for the real training patients.
SETTINGS = {"real": None, "all": phantom.INGREDIENTS, "none": ()}
for name in phantom.INGREDIENTS:
    SETTINGS[f"without {name}"] = tuple(i for i in phantom.INGREDIENTS if i != name)
FEW = ("real", "all", "none", "without texture", "without valves")


def rows(world, patients=120, settings=FEW, seeds=1, steps=300):
    """`patients`: of the phantom; `steps`: of each segmenter's training."""
    common = {"patients": patients, "version": phantom.VERSION}
    named = {"measure": common}
    for seed in range(seeds):
        for name in settings:
            named[f"{name}, {seed}"] = common | {"setting": name, "seed": seed, "steps": steps}
    return named


def compute(world, patients, version, **training):
    found = trained(world, patients, **training) if training else measured(world, patients)
    made = results.provenance(COMMAND)
    return found | {"made": {key: made[key] for key in ("date", "hardware", "command", "commit")}}


def collect(world, found):
    return {"phantom_realism": record(found)}


def record(found):
    """What `measure` found, and of each setting the means over its seeds."""
    measure, runs, segmenter = found.pop("measure"), list(found.values()), {}
    parts = {"measure": measure.pop("made"), "segment": runs[0]["made"]}
    for name in dict.fromkeys(run["setting"] for run in runs):
        mine = [run for run in runs if run["setting"] == name]
        dice, sd, by_class = (
            np.array([run[k] for run in mine]) for k in ("dice", "sd", "by_class")
        )
        segmenter[name] = {
            "seeds": [run["seed"] for run in mine],
            "dice": by_structure(dice.mean(0)),
            "sd_over_seeds": by_structure(dice.std(0)),
            "sd_over_patients": by_structure(sd.mean(0)),
            "by_class": by_class.mean(0),
        }
    return measure | {"segmenter": segmenter, "training": runs[0]["training"], "parts": parts}


def trained(world, patients, setting, seed, steps):
    """Dice on real validation patients of a segmenter trained on one setting with one seed."""
    real, ingredients = world.frames(like=SQUARE), SETTINGS[setting]
    frames = real.where(real.table.split == "training")
    if ingredients is not None:
        frames = phantom_frames(world, ingredients, patients)
    recipe = replace(world.profile.segmenter, steps=steps)
    model, _ = downstream.train_segmenter(frames, world.profile, recipe=recipe, seed=seed, **QUIET)
    unseen = real.where(real.table.split == "validation")
    dice = pd.DataFrame(dice_of(model, unseen.images, unseen))
    by_patient = dice.groupby(unseen.table.patient.to_numpy()).mean()
    by_class = dice.groupby(camus.class_index(unseen.table)).mean().to_numpy()
    scores = {"dice": by_patient.mean().to_numpy(), "sd": by_patient.std(ddof=0).to_numpy()}
    facts = {"setting": setting, "seed": seed, "training": {"steps": steps, "batch": recipe.batch}}
    return facts | scores | {"by_class": by_class}


@kept
def phantom_frames(world, ingredients, patients):
    """Frames of the default phantom's first patients with these ingredients."""
    seed = world.profile.phantom_seed

    def make():
        jobs = (delayed(render)(seed, index, ingredients) for index in range(patients))
        pairs = [pair for part in Parallel(results.cores())(jobs) for pair in part]
        images, masks = (torch.stack(arrays) for arrays in zip(*pairs, strict=True))
        return {"images": images[:, None], "masks": masks}

    key = [phantom.VERSION, seed, patients, SQUARE.side, list(ingredients)]
    stored = cached("rendered", key, make)
    rows = [(phantom.patient(seed, i).name, *c) for i in range(patients) for c in camus.CLASSES]
    table = pd.DataFrame(rows, columns=["patient", "view", "phase"])
    # After the stretching no pixel spacing is left
    table = table.assign(split="training", lateral_mm=np.nan, depth_mm=np.nan)
    return data.Frames(stored["images"].float() / 127.5 - 1, stored["masks"], table)


def render(seed, index, ingredients):
    """The four frames of one phantom patient as the book sees them: [(image, mask), ...], uint8."""
    pairs = []
    for view, phase in camus.CLASSES:
        image, mask, _ = phantom.frame(phantom.patient(seed, index), view, phase, ingredients)
        image, mask, _ = data.to_square(image.T, mask.T, (1, 1), SQUARE.side, keep_aspect=False)
        pairs.append((image.round().clamp(0, 255).to(torch.uint8), mask))
    return pairs


# --- statistics -----------------------------------------------------------------------------------


def measured(world, patients):
    """Areas, grey values, contrast, speckle, spectra and ejection fractions, of both worlds."""
    frames, made_up = (
        world.frames(like=SQUARE),
        phantom_frames(world, phantom.INGREDIENTS, patients),
    )
    real, ours = describe(frames), describe(made_up)
    for name, areas in ours["areas"].items():
        for label, (mean, sd) in real["areas"][name].items():
            areas[label].append((areas[label][0] - mean) / sd)
    grey, histograms = np.linspace(0, 255, BINS), real["histograms"]
    distances = {
        region: stats.wasserstein_distance(grey, grey, histograms[region], shares)
        for region, shares in ours["histograms"].items()
    }
    ef = stats.ks_2samp(real["ef"], ours["ef"])
    for of_world in (real, ours):
        fractions = of_world["ef"]
        of_world["ef"] = {
            "summary": summary(fractions),
            "at_most_45": np.mean(fractions <= 45),
            "percentiles": np.percentile(fractions, range(0, 101, 5)),
        }
    counts = {"patients": patients, "real_patients": frames.table.patient.nunique()}
    return (
        {"real": real, "phantom": ours, "version": phantom.VERSION}
        | counts
        | {
            "histogram_distance": distances,
            "ef_distance": {"kolmogorov_smirnov": ef.statistic, "p": ef.pvalue},
        }
    )


def describe(frames):
    """What is compared, of one world: means with standard deviations, histograms, a spectrum."""
    grey, classes = ((frames.images[:, 0] + 1) * 127.5).numpy(), frames.classes.numpy()
    regions = [regions_of(*pair) for pair in zip(grey, frames.masks.numpy(), strict=True)]
    names, labels = list(regions[0]), list(camus.LABELS)[1:]
    pixels = {k: [g[of[k]] for g, of in zip(grey, regions, strict=True)] for k in names}
    means, spreads = (
        np.array([[f(part) if part.size else np.nan for part in pixels[k]] for k in names]).T
        for f in (np.mean, np.std)
    )
    wall, blood = names.index("myocardium"), names.index("LV cavity")
    difference = means[:, wall] - means[:, blood]
    areas = 100 * anatomy.areas(frames.masks.numpy())
    frequencies, spectrum = metrics.radial_spectrum(frames.images)
    speckled = ("LV cavity", "myocardium", "surroundings")
    return {
        "areas": by_class(classes, labels, areas),  # per cent of the stretched picture
        # Rows are in order of patient, view, phase
        "es_over_ed": dict(zip(labels, map(summary, (areas[1::2] / areas[::2]).T), strict=True)),
        "grey": by_class(classes, names, means),
        "histograms": {k: histogram(parts) for k, parts in pixels.items()},
        "contrast": {  # myocardium against cavity: grey levels, and over their spread (CNR)
            "grey_levels": summary(difference),
            "cnr": summary(difference / np.hypot(spreads[:, wall], spreads[:, blood])),
        },
        "speckle": {k: speckle(grey, [of[k] for of in regions]) for k in speckled},
        "spectrum": {"frequency": frequencies, "decibels": spectrum},
        "ef": anatomy.patients_ef(frames.masks, frames.table).ef.to_numpy(),
    }


def summary(values):
    """[mean, standard deviation] of what is finite."""
    return [float(np.nanmean(values)), float(np.nanstd(values))]


def by_class(classes, names, values):
    """{class: {name: summary}} of values (N, names)."""
    return {
        kind: dict(zip(names, map(summary, values[classes == index].T), strict=True))
        for index, kind in enumerate(camus.CLASS_NAMES)
    }


def regions_of(image, mask):
    """{name: boolean (S, S)}: the three labels, the sector, and the sector outside the labels.

    The sector is what lies between the first and the last pixel above black, in rows and in columns.
    """
    lit, sector = image > 0.5, np.ones(image.shape, bool)
    for axis in (0, 1):
        for turned in (lambda x: x, lambda x, axis=axis: np.flip(x, axis)):
            sector &= turned(np.logical_or.accumulate(turned(lit), axis))
    labels = {name: mask == label for name, label in camus.LABELS.items() if label}
    return labels | {"sector": sector, "surroundings": sector & (mask == 0)}


def histogram(parts):
    """Shares of `BINS` equal grey intervals, every frame weighing the same."""
    counts = [np.histogram(part, BINS, (0, 255))[0] / part.size for part in parts if part.size]
    return np.mean(counts, axis=0)


def speckle(grey, regions):
    """Speckle in a region: SNR, and full widths at half maximum of its autocorrelation, in pixels.

    Local mean and standard deviation are those under a Gaussian of `WINDOW` pixels within the
    region; the SNR is the median of their ratio (of grey values, which are log-compressed: not the
    1.91 of an amplitude). The autocorrelation is that of what remains without the local mean,
    down the picture (axial) and across it (lateral).
    """
    snr, widths = [], []
    for image, region in zip(grey, regions, strict=True):
        if region.sum() < 100:
            continue
        mean, residual = local_mean(image, region), np.zeros(image.shape)
        residual[region] = image[region] - mean
        snr.append(np.median(mean / np.sqrt(local_mean(residual**2, region) + 1e-3)))
        widths.append([half_width(residual, region), half_width(residual.T, region.T)])
    axial, lateral = np.array(widths).T
    return {"snr": summary(snr), "axial_px": summary(axial), "lateral_px": summary(lateral)}


def local_mean(values, region):
    """Mean under a Gaussian within the region, at its pixels."""
    fields = (np.where(region, values, 0.0), region.astype(float))
    total, weight = (ndimage.gaussian_filter(field, WINDOW)[region] for field in fields)
    return total / weight


def half_width(residual, region, lags=8):
    """Full width at half maximum of the autocorrelation along the first axis, linearly interpolated."""
    n, curve = len(residual), []
    for lag in range(lags):
        pairs = max((region[lag:] & region[: n - lag]).sum(), 1)
        curve.append((residual[lag:] * residual[: n - lag]).sum() / pairs)
    curve = np.array(curve) / curve[0]
    below = int(np.argmax(curve < 0.5))  # 0 where it never falls so low
    if not below:
        return np.nan
    return 2 * (below - (0.5 - curve[below]) / (curve[below - 1] - curve[below]))
