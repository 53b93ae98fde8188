"""How strongly the label map may speak: the dial of each of the two generators that read one.

The ControlNet's advice can be multiplied (its strength), the SDM's label map can be weighed against the
empty map (its guidance). Both raise the Dice of what is drawn, and turned too far both spoil the picture.
So both are set by one rule, on frames of training patients: the largest value at which the Frechet distance
to the other training frames is no larger than at 1. Chapters 05 and 06 show it, the shipped checkpoints'
training.json hold the values. 12 minutes on one core.
"""

import numpy as np
from world import by_structure, dice_of, draw, kept, strengthened

from diffecho_utils import metrics

SEEDS, SPLIT, USES = [7000], "training", ("segmenter", "autoencoder")
DIALS = {"text-seg": (1.0, 1.2, 1.4, 1.6, 1.8, 2.0), "sdm": (1.0, 1.25, 1.5, 2.0, 3.0)}


def rows(world, frames=80):
    pairs = [(model, value) for model, values in DIALS.items() for value in values]
    return {f"{m}, {v}": {"model": m, "value": v, "frames": frames} for m, v in pairs}


def compute(world, model, value, frames):
    asked, known = prepared(world, frames)
    generator, guidance = world.generator(model), value
    if model == "text-seg":
        generator, guidance = strengthened(generator, value), None
    seeds = SEEDS[0] + np.arange(len(asked))
    images = draw(generator, asked, seeds, world.profile.sampling_steps, guidance=guidance)
    return {
        "frames": len(asked),
        "dice": by_structure(np.nanmean(dice_of(world.judges[0], images, asked), 0)),
        "distance": metrics.frechet_distance(world.see["autoencoder"](images), known),
    }


@kept
def prepared(world, count):
    """The first training patients' frames, and the features of the others'."""
    frames = world.frames("training")
    mine = frames.table["patient"].isin(frames.table["patient"].unique()[: count // 4])
    return frames.where(mine), world.see["autoencoder"](frames.where(~mine).images)


def collect(world, found):
    counts = [row.pop("frames") for row in found.values()]
    dials = {m: {v: found[f"{m}, {v}"] for v in values} for m, values in DIALS.items()}
    chosen = {
        model: max(v for v, row in of.items() if row["distance"] <= of[1.0]["distance"])
        for model, of in dials.items()
    }
    return {"strength": {"frames": counts[0], "dials": dials, "chosen": chosen}}
