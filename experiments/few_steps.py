"""One step instead of forty evaluations: the SDM, its student and the small decoder side by side.

Each row draws the label map of every validation frame from the same noise, in two runs of seeds. Measured
are Dice of the shipped segmenter's reading, the Frechet distance to the training frames, and the speckle
inside the label maps: its standard deviation, and its spectrum against that of the real frames, since
distances of pooled latents forgive blur. Seconds an image are processor time of one thread; let nothing run beside.
Chapter 07. Half an hour on one core.
"""

import time

import numpy as np
from world import by_structure, dice_of, draw, gathered, kept

from diffecho_utils import assets, checkpoints, metrics, models

SEEDS, SPLIT = (1000, 2000), "validation"
USES = ("segmenter", "autoencoder")
FINE = 0.1  # cycles a pixel from which on the spectrum counts as speckle's
DECODER, SMALL = "small decoder", "data/checkpoints/camus/small-decoder"
ROWS = {
    "SDM": ((20, 2, 1), False),
    "student": ((4, 2, 1), False),
    f"student, {DECODER}": ((2, 1), True),
}


def rows(world, frames=200):
    named = {"real": {"frames": frames}}
    for name, (counts, small) in ROWS.items():
        for steps in counts:
            model = "sdm" if name == "SDM" else "sdm-student"
            for seed in SEEDS:
                how = {"model": model, "steps": steps, "seed": seed, "frames": frames}
                how["decoder"] = assets.root() / SMALL if small else None
                named[f"{name}: {steps}, {seed}"] = how
    return named


@kept
def generator(model, decoder=None):
    folder = assets.checkpoint("camus", model)
    return checkpoints.load_generator(folder, decoder=decoder).to(models.device())


def compute(world, frames, model=None, steps=None, decoder=None, seed=None):
    every = world.frames("validation", like=generator("sdm"))
    asked = every.where(np.arange(len(every)) < frames)
    if model is None:
        return measured(world, asked.images, asked) | {"frames": len(asked)}
    drawn, seeds = generator(model, decoder), seed + np.arange(len(asked))
    begun = time.process_time()
    images = draw(drawn, asked, seeds, steps)
    seconds = (time.process_time() - begun) / len(images)
    found = measured(world, images, asked) | {"seconds_an_image": seconds}
    if decoder:
        few = asked.where(np.arange(len(asked)) < 40)
        large, small = draw(generator(model), few, seeds[:40], steps), images[:40]
        found["psnr"] = float(metrics.psnr(small, large).mean())
        where = metrics.inside(few.masks)
        fine = [metrics.high_frequency_deviation(x, where=where).mean() for x in (small, large)]
        found["fine_detail_kept"] = float(fine[0] / fine[1])
    return found


def measured(world, images, asked):
    known, inside = world.seen("autoencoder", "training"), metrics.inside(asked.masks)
    frequencies, power = metrics.speckle_spectrum(images, asked.masks)
    return {
        "dice": by_structure(np.nanmean(dice_of(world.judges[0], images, asked), 0)),
        "distance": metrics.frechet_distance(world.see["autoencoder"](images), known),
        "detail": float(metrics.high_frequency_deviation(images, where=inside).mean()),
        "spectrum": {f"{f:.4f}": float(p) for f, p in zip(frequencies, power, strict=True)},
    }


def collect(world, found):
    real = found.pop("real")
    steps = {}
    for name, (counts, _) in ROWS.items():
        for count in counts:
            runs = [found[f"{name}: {count}, {seed}"] for seed in SEEDS]
            for run in runs:
                gaps = [
                    run["spectrum"][f] - p for f, p in real["spectrum"].items() if float(f) >= FINE
                ]
                run["speckle_db"] = float(np.sqrt(np.mean(np.square(gaps))))
            calls = count * (2 if name == "SDM" else 1)  # guidance asks twice
            steps[f"{name}, {count}"] = {"evaluations": calls} | gathered(runs)
    return {"few_steps": {"real": real, "drawn": steps}}
