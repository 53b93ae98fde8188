"""Steps, solvers and guidance: what chapter 07 shows and does not run.

Solvers: the SDM draws the label map of every validation frame with each solver and number of steps, from
the same noise. Guidance: the text model and the SDM draw half of the patients at several scales, everywhere
and within a third of the timesteps. Measured are the Frechet distance to the training frames (features of
chapter 03), Dice of the shipped segmenter's reading with the label map, the class by the shipped
classifier, diversity, and processor seconds an image. An hour on one core.
"""

import time

import numpy as np
import torch
from safetensors import safe_open
from world import dice_of, draw, kept, patients, thinned

from diffecho_utils import (
    DiffEchoError,
    assets,
    camus,
    checkpoints,
    downstream,
    intervals,
    metrics,
    synthetic,
)

KNOWN = assets.features("camus", "cpu", "03_features")
SEEDS, SPLIT = [1000], "validation"  # of the first image; frame i has the same noise in every row
USES = ("segmenter", "classifier", "sdm", KNOWN)
# Euler is not among them: it takes DDIM's steps (chapter 07, section 2).
SPACED = ("DPM-Solver++", "DDIM", "UniPC", "DDPM")
LONGEST = ("DPM-Solver++", "DDPM")  # at a hundred steps: one that has long converged, one not
INTERVALS = ((0, 333), (333, 666), (666, 999))
SCALES = {"text": (1.0, 2.0, 3.0, 5.0, 8.0), "sdm": (1.0, 1.5, 2.0, 3.0, 5.0)}
STRONG = {"text": 5.0, "sdm": 3.0}  # the scale that the intervals are tried at


PLAIN = {"model": "sdm", "solver": "DPM-Solver++", "spacing": "trailing", "steps": None}
PLAIN |= {"guidance": None, "interval": None}  # everywhere, as the checkpoint says


def rows(world, frames=200, steps=(5, 10, 20, 50, 100), guided_steps=20):
    few, many = ([n for n in sorted(steps) if (n > 50) == long] for long in (False, True))
    # Stable Diffusion's own spacing, for comparison.
    first = [("DPM-Solver++", n, "leading") for n in few if n <= 20]
    first += [(solver, n, "trailing") for n in few for solver in SPACED]
    last = [(solver, n, "trailing") for n in many for solver in LONGEST]

    def solvers(asked):
        keys = ("solver", "steps", "spacing")
        return {
            f"solvers: {s}, {n}, {spacing}": PLAIN | dict(zip(keys, (s, n, spacing), strict=True))
            for s, n, spacing in asked
        }

    named = {"given": {}} | solvers(first)
    for model, scales in SCALES.items():
        told, strong = PLAIN | {"model": model, "steps": guided_steps, "half": True}, STRONG[model]
        for scale in scales:
            named[f"guidance: {model}, {scale:g}"] = told | {"guidance": scale}
        for low, high in INTERVALS:
            within = told | {"guidance": strong, "interval": [low, high]}
            named[f"guidance: {model}, {strong:g} from {low} to {high}"] = within
    return {row: how | {"frames": frames} for row, how in (named | solvers(last)).items()}


def compute(world, frames, half=False, **values):
    """One row of the record: the frames, or every second patient's, drawn and measured; or as they are."""
    every = world.frames("validation", like=world.generator("sdm"))
    every = every.where(np.arange(len(every)) < frames)
    owners = patients(every)
    keep = thinned(every, 2 if half else 1)
    asked = every.where(keep)
    if not values:
        floor = distance(world.see["autoencoder"](asked.images), owners)
        counts = {"frames": len(asked), "patients": len(set(owners))}
        return counts | {"floor": floor, "given": judged(world, asked.images, asked)}
    generator, seeds = world.generator(values["model"]), SEEDS[0] + np.flatnonzero(keep)
    if values["guidance"] is None:
        values["guidance"] = generator.guidance
    dials = {name: values[name] for name in ("steps", "solver", "spacing", "guidance")}
    begun = time.process_time()
    images = draw(generator, asked, seeds, guidance_interval=values["interval"], **dials)
    seconds, found = (time.process_time() - begun) / len(images), world.see["autoencoder"](images)
    values |= {"images": len(images), "seconds_an_image": seconds}
    values |= {"distance": distance(found, owners[keep]), "diversity": diversity(found, asked)}
    return values | judged(world, images, asked)


@kept
def reference():
    """Chapter 03's features of the training frames, of the SDM's own autoencoder."""
    made = checkpoints.read_training(assets.checkpoint("camus", "sdm"))
    with safe_open(KNOWN, "np") as file:
        real, facts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    if facts["autoencoder"] != made["needs"]["autoencoder"]["sha256"]:
        raise DiffEchoError("features of another autoencoder: record chapter 3 on CAMUS again")
    return metrics.fitted(real["features"][real["split"] == 0].astype(float))


def distance(found, owners):
    """(Frechet distance, low, high), patients drawn."""
    return intervals.distance(lambda r: metrics.frechet_distance(found[r], reference()), owners)


def diversity(found, asked):
    """Mean distance of the features of two images of one class."""
    classes = asked.classes.numpy()
    parts = [torch.from_numpy(found[classes == c]) for c in range(len(camus.CLASSES))]
    return float(np.mean([torch.pdist(part).mean() for part in parts]))


def judged(world, images, asked):
    """Dice with the label maps and share whose class is recognised, with intervals."""
    segmenter, classifier = world.judges
    dice = np.nanmean(dice_of(segmenter, images, asked), 1)
    hits = downstream.classify(classifier, images).argmax(1) == asked.classes
    measured = {"dice": dice, "recognised": hits.numpy().astype(float)}
    return {name: intervals.mean(v, patients(asked)) for name, v in measured.items()}


def collect(world, found):
    given = found.pop("given")
    values = {"frames": given.pop("frames")}
    values["weights"] = {name: synthetic.digest(world.generator(name)) for name in SCALES}
    for kind in ("solvers", "guidance"):
        start = f"{kind}: "
        of_kind = {name: row for name, row in found.items() if name.startswith(start)}
        values[kind] = {name.removeprefix(start): row for name, row in of_kind.items()}
    return {"sampling": values | given}
