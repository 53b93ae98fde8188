"""Why a picture does not show the phase of its label map: the text + segmentation model's dials, one at a time.

The map fixes the phase, yet a classifier reads it less often than in real frames. Each row changes one thing of
a first choice: the words (with the phase, without it, clinical ones), what guidance is against (no words, or
neither words nor map), its scale, and how strongly the ControlNet speaks; the last is how the book draws so far.
Measured on the frames of every second validation patient, in two runs of seeds: view and phase as the shipped classifier reads
them, Dice of the shipped segmenter's reading, Frechet distance to the training frames. Half an hour on one core.
"""

import numpy as np
from world import by_structure, dice_of, draw, gathered, strengthened, thinned

from diffecho_utils import downstream, metrics, prompts

SEEDS, SPLIT = (1000, 2000), "validation"
USES = ("segmenter", "classifier", "autoencoder")
FIRST = {"template": "paper", "null": "all", "guidance": 1.5, "strength": 1.0}
CHANGES = {
    "first choice": {},
    "words without the phase": {"template": "paper-seg"},
    "clinical words": {"template": "clinical"},
    "guided against no words": {"null": "words"},
    "not guided": {"guidance": 1.0},
    "guided more": {"guidance": 2.0},
    "strength 1.4": {"strength": 1.4},
    "strength 1.8": {"strength": 1.8},
    "as drawn so far": {
        "template": "paper-seg",
        "guidance": 1.0,
        "strength": 1.8,
    },
}


def rows(world, frames=100):
    return {
        f"{name}: {seed}": FIRST | change | {"model": "text-seg", "seed": seed, "frames": frames}
        for name, change in CHANGES.items()
        for seed in SEEDS
    }


def compute(world, model, template, null, guidance, strength, seed, frames):
    every = world.frames("validation")
    asked = every.where(thinned(every, max(1, len(every) // frames)))
    words = prompts.make(asked.table, template)
    generator = strengthened(world.generator(model), strength, null=null)
    seeds, steps = seed + np.arange(len(asked)), world.profile.sampling_steps
    images = draw(generator, asked, seeds, steps, guidance=guidance, prompts=words)
    seen, known = world.see["autoencoder"](images), world.seen("autoencoder", "training")
    segmenter, classifier = world.judges
    return {
        "frames": len(asked),
        **downstream.class_accuracies(downstream.classify(classifier, images), asked.classes),
        "dice": by_structure(np.nanmean(dice_of(segmenter, images, asked), 0)),
        "distance": metrics.frechet_distance(seen, known),
    }


def collect(world, found):
    counts, named = {row.pop("frames") for row in found.values()}, {}
    for name, change in CHANGES.items():
        runs = [found[f"{name}: {seed}"] for seed in SEEDS]
        named[name] = {"dials": FIRST | change} | gathered(runs)
    return {"phase": {"frames": counts.pop(), "drawn": named}}
