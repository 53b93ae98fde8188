"""What the checkpoints trained on the phantom are worth: a record for their cards.

    python benchmarks/checkpoints.py      (5 minutes on one core)

On the validation patients of the default phantom, none of which was trained on: what the autoencoder keeps,
how well the words fit the frames, and, since the phantom has no shipped judge, how well a segmenter that is
trained here for a moment on the phantom's training patients reads what the ControlNet draws to a map.
Written to data/results/phantom/cpu/checkpoints.json.
"""

from dataclasses import replace

import numpy as np
import torch

from diffecho_utils import (
    assets,
    camus,
    checkpoints,
    data,
    downstream,
    metrics,
    models,
    phantom,
    profiles,
    prompts,
    results,
    sampling,
    synthetic,
)


def main():
    folders = {
        name: assets.checkpoint("phantom", name) for name in ("autoencoder", "clip", "text-seg")
    }
    profile = profiles.get("cpu")
    root = assets.workspace() / f"phantom-{profile.name}"
    phantom.ensure(root, patients=profile.phantom_patients, seed=profile.phantom_seed)
    table = camus.read_table(root)
    known, unseen = (
        data.load_frames(camus.select(table, split), profile)
        for split in ("training", "validation")
    )
    patients = unseen.table["patient"].to_numpy()

    vae = checkpoints.load_autoencoder(folders["autoencoder"])
    again = data.decode(vae, data.encode(vae, unseen.images))
    brief = replace(profile.segmentation, steps=400)
    judge, _ = downstream.train_segmenter(known, profile, recipe=brief)
    generator = checkpoints.load_generator(folders["text-seg"])
    drawn = sampling.sample(
        generator,
        1000 + np.arange(len(unseen)),
        profile.sampling_steps,
        **sampling.told("text-seg", unseen),
    )
    dice = {}
    for name, images in (("given", unseen.images), ("reconstructed", again), ("drawn", drawn)):
        scores = downstream.dice(downstream.segment(judge, images), unseen.masks)
        dice[name] = {
            part: interval(column, patients)
            for part, column in zip(downstream.STRUCTURES, scores.T, strict=True)
        }
    results.save(
        assets.root() / "data" / "results" / "phantom" / profile.name,
        "checkpoints",
        {
            "frames": len(unseen),
            "patients": len(set(patients)),
            "psnr": interval(metrics.psnr(again, unseen.images).numpy(), patients),
            "dice": dice,
            "retrieved": retrieved(folders["clip"], unseen),
        },
        world="phantom",
        profile=profile.name,
        command="python benchmarks/checkpoints.py",
        seeds=[1000],
        split="validation",
    )
    print(dice)


def interval(values, groups):
    """(mean, low, high): 95 % bootstrap interval over patients."""
    low, high = metrics.bootstrap_interval(lambda rows: np.nanmean(values[rows]), groups)
    return np.nanmean(values), low, high


@torch.no_grad()
def retrieved(folder, frames):
    """Share of frames to which CLIP gives, of the four classes' sentences, the right view and phase."""
    clip, tokenizer = checkpoints.load_clip(folder)
    kinds, _ = synthetic.plan("text", 1)
    ids = models.tokens(tokenizer, prompts.make(kinds, "paper"))
    logits = clip(input_ids=ids, pixel_values=frames.images).logits_per_image
    return downstream.class_accuracies(logits.softmax(1), frames.classes)


if __name__ == "__main__":
    main()
