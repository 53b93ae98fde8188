"""How strongly the label map may speak: the dial of each of the two generators that read one.

    python benchmarks/strength.py --data ROOT      (12 minutes on one core)

The ControlNet's advice can be multiplied (its strength), the SDM's label map can be weighed against the empty
map (its guidance). Both raise the Dice of what is drawn, and turned too far both spoil the picture. So both
are set by one rule, on 80 frames of training patients: the largest value at which the Frechet distance to the
other training frames is no larger than at 1. Written to data/results/camus/cpu/strength.json, which
chapters 05 and 06 show; the shipped checkpoints' training.json hold the strength and the guidance.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from diffecho_utils import (
    assets,
    camus,
    checkpoints,
    data,
    downstream,
    metrics,
    models,
    profiles,
    results,
    sampling,
)

DIALS = {"text-seg": (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.4), "sdm": (1.0, 1.25, 1.5, 2.0, 3.0)}
FRAMES = 80


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="CAMUS folder")
    options = parser.parse_args()
    profile = profiles.get("cpu")
    rows = camus.select(camus.read_table(options.data), "training")
    judge = checkpoints.load_network(assets.checkpoint("camus", "segmenter"))
    frames = data.load_frames(rows, judge, cache_dir=assets.workspace() / "cache")
    patients = frames.table["patient"].unique()
    mine = frames.table["patient"].isin(patients[: FRAMES // 4])
    asked, others = frames.where(mine), frames.where(~mine)
    found, chosen = {}, {}
    for model, dial in DIALS.items():
        generator = checkpoints.load_generator(assets.checkpoint("camus", model))
        reference = metrics.features(generator.vae, others.images)
        found[model] = {}
        for value in dial:
            images = draw(generator, asked, profile.sampling_steps, value)
            dice = downstream.dice(downstream.segment(judge, images), asked.masks)
            found[model][value] = {
                "dice": dict(zip(downstream.STRUCTURES, np.nanmean(dice, 0), strict=True)),
                "distance": metrics.frechet_distance(
                    metrics.features(generator.vae, images), reference
                ),
            }
            print(model, value, found[model][value], flush=True)
        most = found[model][1.0]["distance"]
        chosen[model] = max(v for v, row in found[model].items() if row["distance"] <= most)
    print("chosen:", chosen)
    results.save(
        assets.root() / "data" / "results" / "camus" / profile.name,
        "strength",
        {"frames": len(asked), "dials": found, "chosen": chosen},
        world=frames.table.attrs["world"],
        profile=profile.name,
        command="python benchmarks/strength.py --data /path/to/camus",
        seeds=[7000],
        split="training",
    )


def draw(generator, frames, steps, value):
    """One image for each frame's label map, with the dial of its generator at `value`."""
    told, seeds = sampling.told(generator.model, frames), 7000 + np.arange(len(frames))
    if generator.model == "sdm":
        return sampling.sample(generator, seeds, steps, guidance=value, **told)
    denoiser = generator.denoiser
    stronger = models.TextSegmentationGuided(denoiser.unet, denoiser.controlnet, value).eval()
    return sampling.sample(replace(generator, denoiser=stronger), seeds, steps, **told)


if __name__ == "__main__":
    main()
