"""What the checkpoints trained on the phantom are worth: a record for their cards.

On the validation patients of the default phantom, none of which was trained on: what the autoencoder keeps,
how well the words fit the frames, and, since the phantom has no shipped judge, how well a segmenter that is
trained here for a moment on the phantom's training patients reads what the ControlNet draws to a map.
5 minutes on one core.
"""

from dataclasses import replace

import numpy as np
import torch
from world import QUIET, by_structure, dice_of, draw, patients

from diffecho_utils import (
    assets,
    checkpoints,
    data,
    downstream,
    intervals,
    metrics,
    models,
    prompts,
    synthetic,
)

WORLD, SEEDS, SPLIT = "phantom", [1000], "validation"
USES = [assets.checkpoint("phantom", name) for name in ("autoencoder", "clip", "text-seg")]


def rows(world, steps=400):
    return {"checkpoints": {"steps": steps}}


def compute(world, steps):
    autoencoder, clip, text_seg = USES
    known, unseen = (world.frames(split, world.profile) for split in ("training", "validation"))
    owners, vae = patients(unseen), checkpoints.load_autoencoder(autoencoder)
    brief = replace(world.profile.segmenter, steps=steps)
    judge, _ = downstream.train_segmenter(known, world.profile, recipe=brief, **QUIET)
    generator, seeds = checkpoints.load_generator(text_seg), SEEDS[0] + np.arange(len(unseen))
    again = data.decode(vae, data.encode(vae, unseen.images))
    drawn = draw(generator, unseen, seeds, world.profile.sampling_steps, guidance=1.0)
    dice = {}
    for name, images in (("given", unseen.images), ("reconstructed", again), ("drawn", drawn)):
        scores = [intervals.mean(of, owners) for of in dice_of(judge, images, unseen).T]
        dice[name] = by_structure(np.transpose(scores))
    counts = {"frames": len(unseen), "patients": len(set(owners))}
    psnr = intervals.mean(metrics.psnr(again, unseen.images).numpy(), owners)
    return counts | {"psnr": psnr, "dice": dice, "retrieved": retrieved(clip, unseen)}


@torch.no_grad()
def retrieved(folder, frames):
    """Share of frames to which CLIP gives, of the four classes' sentences, the right view and phase."""
    clip, tokenizer = checkpoints.load_clip(folder)
    kinds, _ = synthetic.plan("text", 1)
    ids = models.tokens(tokenizer, prompts.make(kinds, "paper"))
    logits = clip(input_ids=ids, pixel_values=frames.images).logits_per_image
    return downstream.class_accuracies(logits.softmax(1), frames.classes)


def collect(world, found):
    return found
