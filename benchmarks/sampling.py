"""Steps, solvers and guidance on CAMUS: what chapter 07 shows and does not run.

    python benchmarks/sampling.py --data ROOT      (an hour on one core; goes on where it was stopped)

Solvers: the SDM draws the label map of every validation frame with each solver and number of steps, from
the same noise. Guidance: the text model and the SDM draw half of the patients at several scales, everywhere
and within a third of the timesteps. Measured are the Frechet distance to the training frames (features of
chapter 03), Dice of the shipped segmenter's reading with the label map, the class by the shipped
classifier, diversity, and processor seconds an image. Each row is a file of its own below _build/runs,
under the weights and frames it is of; rows that are there are kept, so the command can be stopped at any
moment and repeated, and two can run at once, one for each --kind. At its end the command collects what is
there in data/results/camus/cpu/sampling.json (or --out).
"""

import argparse
import hashlib
import json
import re
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from diffecho_utils import (
    DiffEchoError,
    assets,
    camus,
    checkpoints,
    data,
    downstream,
    files,
    metrics,
    profiles,
    results,
    sampling,
    synthetic,
)

SEED = 1000  # of the first image; frame i has the same noise in every row
STEPS = (5, 10, 20, 50, 100)
# Euler is not among them: it takes DDIM's steps (chapter 07, section 2).
SPACED = ("DPM-Solver++", "DDIM", "UniPC", "DDPM")
LONGEST = ("DPM-Solver++", "DDPM")  # at a hundred steps: one that has long converged, one not
INTERVALS = ((0, 333), (333, 666), (666, 999))
SCALES = {"text": (1.0, 2.0, 3.0, 5.0, 8.0), "sdm": (1.0, 1.5, 2.0, 3.0, 5.0)}
STRONG = {"text": 5.0, "sdm": 3.0}  # the scale that the intervals are tried at


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="CAMUS folder")
    parser.add_argument("--out", type=Path, help="default: data/results/camus/cpu")
    parser.add_argument("--frames", type=int, default=200, help="validation frames, whole patients")
    parser.add_argument("--kind", choices=("solvers", "guidance"), help="only these rows")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="of the solvers' rows")
    parser.add_argument("--guided-steps", type=int, default=20, help="of the guidance's rows")
    options = parser.parse_args()
    profile = profiles.get("cpu")
    folder = options.out or assets.root() / "data" / "results" / "camus" / profile.name
    table = camus.select(camus.read_table(options.data), "validation")
    generator = checkpoints.load_generator(assets.checkpoint("camus", "sdm"))
    frames = data.load_frames(table, generator, cache_dir=assets.workspace() / "cache")
    frames = frames.where(np.arange(len(frames)) < options.frames)
    meter = Meter(frames)
    setting = {"frames": len(frames), "weights": meter.weights}
    key = hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:8]
    kept = assets.workspace() / "runs" / f"sampling-{key}"
    kept.mkdir(parents=True, exist_ok=True)
    values = setting | {"solvers": {}, "guidance": {}}
    for kind, name, todo in rows(options.steps, options.guided_steps, frames):
        path = kept / f"{kind}-{re.sub(r'[^a-z0-9.]+', '_', name.lower())}.json"
        if not path.is_file() and options.kind in (None, kind):
            row = meter.row(**todo)
            print(name, row, flush=True)
            files.write_text(path, json.dumps(row, default=float))
        if path.is_file():
            values[kind][name] = json.loads(path.read_text())
    given = meter.judged(frames.images, np.full(len(frames), True))
    values |= {"patients": len(set(meter.patients)), "floor": meter.floor(), "given": given}
    results.save(
        folder,
        "sampling",
        values,
        world=table.attrs["world"],
        profile=profile.name,
        command=f"python benchmarks/sampling.py --data /path/to/camus --frames {len(frames)}",
        seeds=[SEED],
        split="validation",
    )


def rows(counts, guided_steps, frames):
    """What to measure, the most telling first: (kind, name, arguments of `Meter.row`)."""
    trailing = [(solver, n, "trailing") for n in sorted(counts) if n <= 50 for solver in SPACED]
    # Stable Diffusion's own spacing, for comparison.
    leading = [("DPM-Solver++", n, "leading") for n in sorted(counts) if n <= 20]
    last = [(solver, n, "trailing") for n in sorted(counts) if n > 50 for solver in LONGEST]
    yield from map(solver_row, leading + trailing)
    patients = frames.table["patient"].to_numpy()
    half = np.isin(patients, list(dict.fromkeys(patients))[::2])
    for model, scales in SCALES.items():
        settings = {"model": model, "steps": guided_steps, "keep": half}
        for scale in scales:
            yield "guidance", f"{model}, {scale:g}", settings | {"guidance": scale}
        for low, high in INTERVALS:
            strong = {"guidance": STRONG[model], "interval": (low, high)}
            name = f"{model}, {STRONG[model]:g} from {low} to {high}"
            yield "guidance", name, settings | strong
    yield from map(solver_row, last)


def solver_row(row):
    solver, steps, spacing = row
    settings = {"model": "sdm", "solver": solver, "spacing": spacing, "steps": steps}
    return "solvers", f"{solver}, {steps}, {spacing}", settings


class Meter:
    """The frames, the generators, the judges and the real frames' features."""

    def __init__(self, frames):
        folders = {name: assets.checkpoint("camus", name) for name in SCALES}
        self.frames = frames
        self.generators = {name: checkpoints.load_generator(path) for name, path in folders.items()}
        self.weights = {name: synthetic.digest(g) for name, g in self.generators.items()}
        self.segmenter, self.classifier = (
            checkpoints.load_network(assets.checkpoint("camus", name))
            for name in ("segmenter", "classifier")
        )
        coder = checkpoints.read_training(folders["sdm"])["needs"]["autoencoder"]["sha256"]
        with safe_open(assets.features("camus", "cpu", "03_features"), "np") as file:
            real, facts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
        if facts["autoencoder"] != coder:
            raise DiffEchoError("features of another autoencoder: record chapter 3 on CAMUS again")
        self.known = metrics.fitted(real["features"][real["split"] == 0].astype(float))
        self.patients = frames.table["patient"].to_numpy()

    def row(
        self,
        model,
        steps,
        solver="DPM-Solver++",
        spacing="trailing",
        guidance=None,
        interval=None,
        keep=None,
    ):
        """Draw the frames to keep and measure them: one row of the record."""
        keep = np.full(len(self.frames), True) if keep is None else keep
        generator, asked = self.generators[model], self.frames.where(keep)
        guidance = generator.guidance if guidance is None else guidance
        scheduler = sampling.SOLVERS[solver].from_config(
            generator.scheduler.config, timestep_spacing=spacing
        )
        begun = time.process_time()
        images = sampling.sample(
            generator,
            SEED + np.flatnonzero(keep),
            steps,
            guidance=guidance,
            guidance_interval=interval,
            scheduler=scheduler,
            **sampling.told(model, asked),
        )
        seconds = (time.process_time() - begun) / len(images)
        found = metrics.features(generator.vae, images)
        settings = {"model": model, "solver": solver, "spacing": spacing, "steps": steps}
        settings |= {"guidance": guidance, "interval": interval, "images": len(images)}
        return (
            settings
            | {"seconds_an_image": seconds, "distance": self.distance(found, keep)}
            | {"diversity": self.diversity(found, asked)}
            | self.judged(images, keep)
        )

    def floor(self):
        """(distance, low, high) of the given frames themselves."""
        found = metrics.features(self.generators["sdm"].vae, self.frames.images)
        return self.distance(found, np.full(len(found), True))

    def distance(self, found, keep):
        return interval_of(
            lambda rows: metrics.frechet_distance(found[rows], self.known), self.patients[keep]
        )

    def diversity(self, found, asked):
        """Mean distance of the features of two images of one class."""
        classes = asked.classes.numpy()
        parts = [torch.from_numpy(found[classes == c]) for c in range(len(camus.CLASSES))]
        return float(np.mean([torch.pdist(part).mean() for part in parts]))

    def judged(self, images, keep):
        """Dice with the label maps and share whose class is recognised, with intervals."""
        asked, groups = self.frames.where(keep), self.patients[keep]
        dice = downstream.dice(downstream.segment(self.segmenter, images), asked.masks)
        dice = np.nanmean(dice, 1)
        hits = downstream.classify(self.classifier, images).argmax(1) == asked.classes
        hits = hits.numpy().astype(float)
        return {
            "dice": interval_of(lambda rows: np.nanmean(dice[rows]), groups),
            "recognised": interval_of(lambda rows: hits[rows].mean(), groups),
        }


def interval_of(statistic, groups):
    """(value, low, high): 95 % bootstrap interval over patients."""
    low, high = metrics.bootstrap_interval(statistic, groups, repeats=50)
    return float(statistic(np.arange(len(groups)))), low, high


if __name__ == "__main__":
    main()
