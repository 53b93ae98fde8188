"""Why a picture does not show the phase of its label map: the text + segmentation model's dials, one at a time.

The map fixes the phase, yet a classifier reads it less often than in real frames. Each row changes one thing of
how the shipped model draws: the words (the paper's own without the phase, clinical ones, those of the other
phase), what guidance is against (no words; neither words nor map; shipped: no map and the opposite words), its
scale, and how strongly the ControlNet speaks; the last row has the paper's words and all dials at 1.
Measured on the frames of every second validation patient, in two runs of seeds: view and phase as the shipped
classifier reads them, Dice of the shipped segmenter's reading, Frechet distance to the training frames. Record:
phase (chapter 05). Half an hour on one core.
"""

import numpy as np
from world import by_structure, dice_of, draw, gathered, strengthened, thinned

from diffecho_utils import downstream, metrics, prompts, sampling

SEEDS, SPLIT = (1000, 2000), "validation"
USES = ("segmenter", "classifier", "autoencoder")
CHANGES = {
    "as shipped": {},
    "words of the other phase": {"other": True},
    "words without the phase": {"template": "paper-seg"},
    "clinical words": {"template": "clinical"},
    "guided against no words": {"null": "words"},
    "guided against neither": {"null": "all"},
    "not guided": {"guidance": 1.0},
    "strength 1.8": {"strength": 1.8},
    "the paper's words, dials at 1": {"template": "paper-seg", "guidance": 1.0, "strength": 1.0},
}


def rows(world, frames=100):
    settings = {"model": "text-seg", "frames": frames}
    return {
        f"{name}: {seed}": settings | {"seed": seed} | change
        for name, change in CHANGES.items()
        for seed in SEEDS
    }


def compute(world, model, frames, seed, template=sampling.DRAWING_PROMPTS, other=False, **dials):
    every, shipped = world.frames("validation"), world.generator(model)
    own = {"null": shipped.null, "guidance": shipped.guidance}
    dials = own | {"strength": shipped.denoiser.strength} | dials
    asked = every.where(thinned(every, max(1, len(every) // frames)))
    told = asked.table["phase"].replace({"ED": "ES", "ES": "ED"} if other else {})
    words = prompts.make(asked.table.assign(phase=told), template)
    generator = strengthened(shipped, dials["strength"], null=dials["null"])
    seeds, steps = seed + np.arange(len(asked)), world.profile.sampling_steps
    images = draw(generator, asked, seeds, steps, guidance=dials["guidance"], prompts=words)
    seen, known = world.see["autoencoder"](images), world.seen("autoencoder", "training")
    segmenter, classifier = world.judges
    return {
        "dials": dials | {"words": template, "other phase": other},
        "frames": len(asked),
        **downstream.class_accuracies(downstream.classify(classifier, images), asked.classes),
        "dice": by_structure(np.nanmean(dice_of(segmenter, images, asked), 0)),
        "distance": metrics.frechet_distance(seen, known),
    }


def collect(world, found):
    counts, named = {row.pop("frames") for row in found.values()}, {}
    for name in CHANGES:
        runs = [found[f"{name}: {seed}"] for seed in SEEDS]
        named[name] = {"dials": [run.pop("dials") for run in runs][0]} | gathered(runs)
    return {"phase": {"frames": counts.pop(), "drawn": named}}
