"""How much the phantom is like CAMUS: statistics side by side, and a segmenter that saw the phantom alone.

    python benchmarks/phantom_realism.py pack --real ROOT --out camus128.npz      (where CAMUS is elsewhere)
    python benchmarks/phantom_realism.py measure --real ROOT-or-npz --out DIR     (1 minute on two cores)
    python benchmarks/phantom_realism.py segment --real ROOT-or-npz --out DIR     (4 minutes on one GPU)
    python benchmarks/phantom_realism.py collect --out DIR     (writes data/results/camus/cpu/phantom_realism.json)

`segment` trains on the phantom with all its ingredients, with each left out, with none, and on real
training patients; every one is tested on the real validation patients. All stages leave one JSON for each
part in DIR and take up where they were interrupted. Both worlds are stretched to squares of 128 pixels,
as the public re-pack of CAMUS was: shares of the picture survive that, millimetres do not.
"""

import argparse
import json
import multiprocessing
import os
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import ndimage, stats

from diffecho_utils import (
    DiffEchoError,
    anatomy,
    assets,
    camus,
    data,
    downstream,
    files,
    metrics,
    phantom,
    profiles,
    results,
)

SIDE = 128
BINS = 32  # of the grey values 0 to 255
TABLE = ("patient", "view", "phase", "split")  # what `pack` keeps of the table
COMMON = ("version", "patients")  # of the phantom: the same in all parts of a record
WINDOW = 4  # pixels: sd of the Gaussian that separates speckle from what varies slowly


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    for stage in (pack, measure, segment, collect):
        command = commands.add_parser(stage.__name__, help=stage.__doc__)
        command.set_defaults(stage=stage)
        command.add_argument("--out", type=Path, required=True)
        if stage is not collect:
            command.add_argument("--real", type=Path, required=True, help="CAMUS folder, or `pack`")
        if stage is collect:
            command.add_argument("--record", default="phantom_realism", help="name of the record")
        if stage in (measure, segment):
            command.add_argument("--patients", type=int, default=120, help="of the phantom")
        if stage is segment:
            command.add_argument("--settings", nargs="*", default=list(settings()))
            command.add_argument("--seeds", type=int, default=2)
            command.add_argument("--steps", type=int, help="instead of the recipe's")
            command.add_argument("--workers", type=int, default=5, help="trainings at a time")
    options = parser.parse_args()
    options.stage(options)


def settings():
    """{name: ingredients of the phantom to train on}; None stands for the real training patients."""
    without = {
        f"without {name}": tuple(other for other in phantom.INGREDIENTS if other != name)
        for name in phantom.INGREDIENTS
    }
    return {"real": None, "all": phantom.INGREDIENTS, "none": ()} | without


# --- stages ---------------------------------------------------------------------------------------


def pack(options):
    """write the real frames as one file: uint8 images (N, 1, S, S), masks (N, S, S), and their table"""
    frames = real_frames(options.real)
    images = ((frames.images + 1) * 127.5).round().to(torch.uint8)
    columns = {name: frames.table[name].to_numpy(dtype=str) for name in TABLE}
    np.savez_compressed(options.out, images=images.numpy(), masks=frames.masks.numpy(), **columns)
    print(f"{options.out}: {len(frames)} frames, {options.out.stat().st_size / 2**20:.1f} MiB")


def measure(options):
    """compare areas, grey values, contrast, speckle, spectra and ejection fractions"""
    worlds = {
        "real": real_frames(options.real),
        "phantom": phantom_frames(phantom.INGREDIENTS, options.patients, options.out),
    }
    measured = {name: describe(frames) for name, frames in worlds.items()}
    real, ours = measured["real"], measured["phantom"]
    for name in camus.CLASS_NAMES:
        for label, (mean, sd) in real["areas"][name].items():
            ours["areas"][name][label].append((ours["areas"][name][label][0] - mean) / sd)
    grey = np.linspace(0, 255, BINS)
    distances = {
        region: stats.wasserstein_distance(grey, grey, real["histograms"][region], histogram)
        for region, histogram in ours["histograms"].items()
    }
    ef = stats.ks_2samp(real["ef"], ours["ef"])
    for world in measured.values():
        fractions = np.array(world["ef"])
        world["ef"] = {
            "summary": summary(fractions),
            "at_most_45": np.mean(fractions <= 45),
            "percentiles": np.percentile(fractions, range(0, 101, 5)),
        }
    values = measured | {
        "version": phantom.VERSION,
        "patients": options.patients,
        "real_patients": worlds["real"].table.patient.nunique(),
        "histogram_distance": distances,
        "ef_distance": {"kolmogorov_smirnov": ef.statistic, "p": ef.pvalue},
    }
    keep(options.out / "measure.json", values, f"measure --patients {options.patients}")


def segment(options):
    """train the segmenter on each setting of the phantom alone, test it on real validation patients"""
    jobs = [(name, seed) for seed in range(options.seeds) for name in options.settings]
    jobs = [(options, *job) for job in jobs if not finished(options, *job)]
    wanted = sorted({name for _, name, _ in jobs} - {"real"})
    with pool(cores()) as workers:  # rendered here, by all cores
        for name in wanted:
            started = time.perf_counter()
            phantom_frames(settings()[name], options.patients, options.out, workers)
            print(f"frames of {name!r}: {time.perf_counter() - started:.0f} s", flush=True)
    threads = max(1, cores() // options.workers)
    with pool(min(options.workers, max(len(jobs), 1)), threads) as workers:
        for done, line in enumerate(workers.imap_unordered(train_and_test, jobs), start=1):
            print(f"{done}/{len(jobs)} {line}", flush=True)


def collect(options):
    """merge what `measure` and `segment` left in DIR to the record of the book"""
    if not (options.out / "measure.json").exists() or not list(options.out.glob("run-*.json")):
        raise DiffEchoError(
            f"{options.out}: `measure` and `segment` have not both left results here"
        )
    measured = json.loads((options.out / "measure.json").read_text())
    runs = [json.loads(path.read_text()) for path in sorted(options.out.glob("run-*.json"))]
    common = [{key: part["values"][key] for key in COMMON} for part in (measured, *runs)]
    if any(facts != common[0] for facts in common):
        raise DiffEchoError(f"{options.out}: parts of different phantoms; run all stages again")
    segmenter = {}
    for name in settings():
        of_name = [run["values"] for run in runs if run["values"]["setting"] == name]
        if of_name:
            dice = np.array([run["dice"] for run in of_name])
            segmenter[name] = {
                "seeds": [run["seed"] for run in of_name],
                "dice": by_structure(dice.mean(0)),
                "sd_over_seeds": by_structure(dice.std(0)),
                "sd_over_patients": by_structure(np.mean([run["sd"] for run in of_name], 0)),
                "by_class": np.mean([run["by_class"] for run in of_name], 0),
            }
    recipe = {key: runs[0]["values"][key] for key in ("steps", "batch")}
    values = measured["values"] | {
        "segmenter": segmenter,
        "training": recipe,
        "parts": {
            part: {key: record[key] for key in ("date", "hardware", "command", "commit")}
            for part, record in (("measure", measured), ("segment", runs[0]))
        },
    }
    path = results.save(
        assets.root() / "data" / "results" / "camus" / "cpu",
        options.record,
        values,
        world="camus",
        profile="cpu",
        command="python benchmarks/phantom_realism.py {measure,segment,collect}",
        seeds=sorted({run["values"]["seed"] for run in runs}),
        split="statistics: all patients; segmenter: tested on validation",
    )
    table = pd.DataFrame({name: row["dice"] for name, row in segmenter.items()}).T
    print(table.round(3).to_string(), f"\n{path}", sep="")


def by_structure(values):
    return dict(zip(downstream.STRUCTURES, values, strict=True))


# --- frames ---------------------------------------------------------------------------------------


def real_frames(source):
    """All real frames as `data.Frames`, from a CAMUS folder or from the file that `pack` wrote."""
    if Path(source).is_dir():
        return data.load_frames(camus.read_table(source), data.Geometry(SIDE, stretched=True))
    with np.load(source) as packed:
        table = pd.DataFrame({name: packed[name] for name in TABLE})
        return frames_of(packed["images"], packed["masks"], table)


def phantom_frames(ingredients, patients, folder, workers=None):
    """Frames of the default phantom's first patients with these ingredients, cached in `folder`.

    workers: the pool that renders what is not there yet; None: one of all cores, for this call.
    """
    seed = profiles.get("cpu").phantom_seed
    key = [phantom.VERSION, seed, patients, SIDE, list(ingredients)]
    jobs = [(seed, index, ingredients) for index in range(patients)]

    def make():
        with nullcontext(workers) if workers else pool(cores()) as hands:
            pairs = [pair for part in hands.imap(render, jobs) for pair in part]
        images, masks = (torch.stack(arrays) for arrays in zip(*pairs, strict=True))
        return {"images": images[:, None], "masks": masks}

    stored = files.cached(folder / "frames", "phantom", key, make)
    rows = [(phantom.patient(seed, i).name, *c) for i in range(patients) for c in camus.CLASSES]
    table = pd.DataFrame(rows, columns=TABLE[:3]).assign(split="training")
    return frames_of(stored["images"], stored["masks"], table)


def render(job):
    """The four frames of one phantom patient as the book sees them: [(image, mask), ...], uint8."""
    seed, index, ingredients = job
    pairs = []
    for view, phase in camus.CLASSES:
        image, mask, _ = phantom.frame(phantom.patient(seed, index), view, phase, ingredients)
        image, mask, _ = data.to_square(image.T, mask.T, (1, 1), SIDE, keep_aspect=False)
        pairs.append((image.round().clamp(0, 255).to(torch.uint8), mask))
    return pairs


def frames_of(images, masks, table):
    """`data.Frames` of uint8 arrays; after the stretching no pixel spacing is left."""
    table = table.assign(lateral_mm=np.nan, depth_mm=np.nan)
    images = torch.as_tensor(images).float() / 127.5 - 1
    return data.Frames(images, torch.as_tensor(masks), table)


# --- statistics -----------------------------------------------------------------------------------


def describe(frames):
    """What `measure` compares, of one world: a dict of means, standard deviations and histograms."""
    grey = ((frames.images[:, 0] + 1) * 127.5).numpy()
    masks, table = frames.masks.numpy(), frames.table
    regions = [regions_of(image, mask) for image, mask in zip(grey, masks, strict=True)]
    classes = camus.class_index(table)
    labels = list(camus.LABELS)[1:]
    areas = 100 * anatomy.areas(masks)
    means = np.array(
        [[image[r].mean() if r.any() else np.nan for r in of.values()] for image, of in zip(grey, regions, strict=True)]
    )  # fmt: skip
    ratios = [
        areas[i + 1] / areas[i]
        for i in range(0, len(table), 2)  # rows are in order of patient, view, phase
    ]
    frequencies, spectrum = metrics.radial_spectrum(frames.images)
    return {
        "areas": {  # per cent of the stretched picture
            name: dict(zip(labels, map(summary, areas[classes == c].T), strict=True))
            for c, name in enumerate(camus.CLASS_NAMES)
        },
        "es_over_ed": dict(zip(labels, map(summary, np.array(ratios).T), strict=True)),
        "grey": {
            name: dict(zip(regions[0], map(summary, means[classes == c].T), strict=True))
            for c, name in enumerate(camus.CLASS_NAMES)
        },
        "histograms": {
            region: histogram([image[of[region]] for image, of in zip(grey, regions, strict=True)])
            for region in regions[0]
        },
        "contrast": contrast(grey, regions),
        "speckle": {
            region: speckle(grey, [of[region] for of in regions])
            for region in ("LV cavity", "myocardium", "surroundings")
        },
        "spectrum": {"frequency": frequencies, "decibels": spectrum},
        "ef": anatomy.patients_ef(frames).ef.tolist(),
    }


def summary(values):
    """[mean, standard deviation] of what is finite."""
    return [float(np.nanmean(values)), float(np.nanstd(values))]


def regions_of(image, mask):
    """{name: boolean (S, S)}: the three labels, the sector, and the sector outside the labels.

    The sector is what lies between the first and the last pixel above black, in rows and in columns.
    """
    lit, sector = image > 0.5, np.ones(image.shape, bool)
    for axis in (0, 1):
        for turned in (slice(None), slice(None, None, -1)):
            index = tuple(turned if k == axis else slice(None) for k in (0, 1))
            sector[index] &= np.logical_or.accumulate(lit[index], axis)
    labels = {name: mask == label for name, label in camus.LABELS.items() if label}
    return labels | {"sector": sector, "surroundings": sector & (mask == 0)}


def histogram(parts):
    """Shares of `BINS` equal grey intervals, every frame weighing the same."""
    counts = [np.histogram(part, BINS, (0, 255))[0] / part.size for part in parts if part.size]
    return np.mean(counts, axis=0).tolist()


def contrast(grey, regions):
    """Myocardium against cavity: difference of the means in grey levels, and over their spread (CNR)."""
    pairs = [(g[of["myocardium"]], g[of["LV cavity"]]) for g, of in zip(grey, regions, strict=True)]
    difference = np.array([wall.mean() - blood.mean() for wall, blood in pairs])
    spread = np.array([np.hypot(wall.std(), blood.std()) for wall, blood in pairs])
    return {"grey_levels": summary(difference), "cnr": summary(difference / spread)}


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
        weight = ndimage.gaussian_filter(region.astype(float), WINDOW)[region]

        def local(values, region=region, weight=weight):
            field = np.where(region, values, 0.0)
            return ndimage.gaussian_filter(field, WINDOW)[region] / weight

        residual = np.zeros(image.shape)
        mean = local(image)
        residual[region] = image[region] - mean
        snr.append(np.median(mean / np.sqrt(local(residual**2) + 1e-3)))
        widths.append([half_width(residual, region), half_width(residual.T, region.T)])
    axial, lateral = np.array(widths).T
    return {"snr": summary(snr), "axial_px": summary(axial), "lateral_px": summary(lateral)}


def half_width(residual, region, lags=8):
    """Full width at half maximum of the autocorrelation along the first axis, linearly interpolated."""
    correlation = [
        (residual[lag:] * residual[: len(residual) - lag]).sum()
        / max((region[lag:] & region[: len(region) - lag]).sum(), 1)
        for lag in range(lags)
    ]
    curve = np.array(correlation) / correlation[0]
    below = int(np.argmax(curve < 0.5))  # 0 where it never falls so low
    if not below:
        return np.nan
    return 2 * (below - (0.5 - curve[below]) / (curve[below - 1] - curve[below]))


# --- the segmenter --------------------------------------------------------------------------------


def train_and_test(job):
    """Train on one setting with one seed, test on real validation patients, and keep the result."""
    options, name, seed = job
    started = time.perf_counter()
    real = real_frames(options.real)
    ingredients = settings()[name]
    if ingredients is None:
        frames = real.where(real.table.split == "training")
    else:
        frames = phantom_frames(ingredients, options.patients, options.out)
    recipe = recipe_of(options)
    profile = profiles.get("cpu")
    model, _ = downstream.train_segmenter(
        frames, profile, recipe=recipe, seed=seed, progress=lambda line: None
    )
    unseen = real.where(real.table.split == "validation")
    dice = np.asarray(downstream.dice(downstream.segment(model, unseen.images), unseen.masks))
    by_patient = pd.DataFrame(dice).groupby(unseen.table.patient.to_numpy()).mean()
    by_class = pd.DataFrame(dice).groupby(camus.class_index(unseen.table)).mean()
    values = identity(options, name, seed) | {
        "dice": by_patient.mean().tolist(),
        "sd": by_patient.std(ddof=0).tolist(),
        "by_class": by_class.to_numpy().tolist(),
        "seconds": time.perf_counter() - started,
    }
    command = f"segment --patients {options.patients} --seeds {options.seeds}"
    keep(run_path(options, name, seed), values, command)
    return f"{name}, seed {seed}: " + " ".join(f"{value:.3f}" for value in values["dice"])


def recipe_of(options):
    recipe = profiles.get("cpu").segmentation
    return replace(recipe, steps=options.steps) if options.steps else recipe


def identity(options, name, seed):
    """What a run is: a finished run of the same identity is not run again."""
    recipe = recipe_of(options)
    facts = {"setting": name, "seed": seed, "version": phantom.VERSION}
    return facts | dict(patients=options.patients, steps=recipe.steps, batch=recipe.batch)


def run_path(options, name, seed):
    return options.out / f"run-{name.replace(' ', '-')}-{seed}.json"


def finished(options, name, seed):
    try:
        values = json.loads(run_path(options, name, seed).read_text())["values"]
    except FileNotFoundError:
        return False
    return identity(options, name, seed).items() <= values.items()


# --- the machine ----------------------------------------------------------------------------------


def cores():
    return len(os.sched_getaffinity(0))


def pool(processes, threads=1):
    context = multiprocessing.get_context("spawn")
    return context.Pool(processes, initializer=torch.set_num_threads, initargs=(threads,))


def keep(path, values, command):
    """Write one part's values with the provenance of the machine that made them."""
    results.save(
        path.parent,
        path.stem,
        values,
        world="camus",
        profile="cpu",
        command=f"python benchmarks/phantom_realism.py {command}",
    )


if __name__ == "__main__":
    main()
