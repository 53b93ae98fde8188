"""The four shipped generators side by side, and 20 steps of a fast solver against the paper's step counts.

    python benchmarks/generators.py --data ROOT      (40 minutes on one core; --skip-steps: 20)

Each generator draws one image for each frame of the validation patients, in three runs of seeds: the
same classes, and for those that read them the same prompts and label maps. Measured are Dice of the
shipped segmenter's reading with the label map, view and phase by the shipped classifier, Frechet distance
to the training frames (features of chapter 03) with the floor of real held-out frames, and how close the
images come to the nearest training frame. All of it goes to data/results/camus/cpu/generators.json, which
chapter 06 shows.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler
from safetensors.torch import load_file

from diffecho_utils import (
    assets,
    camus,
    checkpoints,
    data,
    downstream,
    files,
    metrics,
    models,
    profiles,
    results,
    sampling,
    synthetic,
)

RUNS = (1000, 2000, 3000)  # seed of each run's first image
# Solver and steps of the paper's own sampling, for each of its models.
PAPER = {
    "unconditional": (DDPMScheduler, 1000),
    "text": (PNDMScheduler, 40),
    "text-seg": (DDIMScheduler, 50),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="CAMUS folder")
    parser.add_argument("--skip-steps", action="store_true", help="leave the paper's steps out")
    options = parser.parse_args()
    profile, table = profiles.get("cpu"), camus.read_table(options.data)
    cache = assets.workspace() / "cache"
    judges = [
        checkpoints.load_network(assets.checkpoint("camus", name))
        for name in ("segmenter", "classifier")
    ]
    known, unseen = (
        data.load_frames(camus.select(table, split), judges[0], cache_dir=cache)
        for split in ("training", "validation")
    )
    vae = checkpoints.load_autoencoder(assets.checkpoint("camus", "autoencoder"))
    real = [
        data.latent_views(vae, frames, cache_dir=cache)["latents"] for frames in (known, unseen)
    ]
    yardstick = {
        "floor": distances(real[1], unseen.classes, real[0], known.classes, patients(unseen)),
        "nearest": closeness(real[1], real[0], patients(unseen)),
    }
    values = {"frames": len(unseen), "steps": profile.sampling_steps, "guidance": {}}
    values |= {"real": yardstick | judged(unseen.images, unseen, judges, masked=True)}
    faster = {}
    for model in models.GENERATORS:
        generator = checkpoints.load_generator(assets.checkpoint("camus", model))
        values["guidance"][model] = generator.guidance
        runs = [drawn(generator, unseen, profile.sampling_steps, seed) for seed in RUNS]
        latents = [data.encode(vae, images) for images in runs]
        scores = [judged(x, unseen, judges, "masks" in sampling.CONDITIONS[model]) for x in runs]
        away = [distances(x, unseen.classes, real[0], known.classes) for x in latents]
        values[model] = {name: spread([s[name] for s in scores]) for name in scores[0]}
        values[model]["distance"] = {name: spread([a[name] for a in away]) for name in away[0]}
        values[model]["nearest"] = spread([closeness(x, real[0])["5 %"] for x in latents])
        print(model, values[model], flush=True)
        if model in PAPER and not options.skip_steps:
            solver, steps = PAPER[model]
            rows = faster[model] = {}
            ours = f"DPM-Solver++, {profile.sampling_steps}"
            for name, n, kind in (
                (ours, profile.sampling_steps, None),
                (f"{solver.__name__.removesuffix('Scheduler')}, {steps}", steps, solver),
            ):
                half = unseen.where(np.arange(len(unseen)) % 2 == 0)
                images, seconds = draw(generator, half, n, RUNS[0], kind)
                found = metrics.features(vae, images)
                theirs = metrics.latent_features(real[0])
                rows[name] = {
                    "distance": metrics.frechet_distance(found, theirs),
                    "seconds_an_image": seconds,
                    "images": len(half),
                }
                print(model, name, rows[name], flush=True)
    values["steps_compared"] = faster
    results.save(
        assets.root() / "data" / "results" / "camus" / profile.name,
        "generators",
        values,
        world=table.attrs["world"],
        profile=profile.name,
        command="python benchmarks/generators.py --data /path/to/camus",
        seeds=RUNS,
        split="validation",
    )


def patients(frames):
    return frames.table["patient"].to_numpy()


def drawn(generator, frames, steps, seed):
    """One image for each frame, from _build/drawn if they are there: rounded to 8 bits."""
    asked = frames.table.assign(prompt=sampling.told("text", frames)["prompts"])
    asked = synthetic.plan_digest(asked[["view", "phase", "prompt"]], frames.masks)
    key = f"{synthetic.digest(generator)}-{generator.guidance:g}-{asked}-{steps}-{seed}"
    path = assets.workspace() / "drawn" / f"{generator.model}-{key}.safetensors"
    if not path.is_file():
        images, _ = draw(generator, frames, steps, seed)
        files.save_tensors(path, {"images": ((images + 1) * 127.5).round().byte()})
    return load_file(path)["images"].float() / 127.5 - 1


def draw(generator, frames, steps, seed, solver=None):
    """(images, seconds an image): one for each frame, told what its generator is told."""
    scheduler = solver and solver.from_config(generator.scheduler.config)
    started = time.perf_counter()
    images = sampling.sample(
        generator,
        seed + np.arange(len(frames)),
        steps,
        guidance=generator.guidance,
        scheduler=scheduler,
        **sampling.told(generator.model, frames),
    )
    return images, (time.perf_counter() - started) / len(frames)


def judged(images, frames, judges, masked):
    """View and phase as the classifier sees them; Dice as the segmenter reads it, where a map was given."""
    segmenter, classifier = judges
    found = downstream.class_accuracies(downstream.classify(classifier, images), frames.classes)
    if masked:
        dice = downstream.dice(downstream.segment(segmenter, images), frames.masks)
        found |= dict(zip(downstream.STRUCTURES, np.nanmean(dice, 0), strict=True))
    return found


def distances(latents, classes, reference, reference_classes, groups=None):
    """Frechet distance to the reference by class; with groups (floor): (distance, low, high)."""
    found = {}
    mine, theirs = metrics.latent_features(latents), metrics.latent_features(reference)
    for index, name in [*enumerate(camus.CLASS_NAMES), (None, "all")]:
        keep = np.full(len(mine), True) if index is None else classes.numpy() == index
        of_class = slice(None) if index is None else reference_classes.numpy() == index
        ref = metrics.fitted(theirs[of_class])
        found[name] = metrics.frechet_distance(mine[keep], ref)
        if groups is not None:
            interval = metrics.bootstrap_interval(
                lambda r, k=keep, ref=ref: metrics.frechet_distance(mine[k][r], ref), groups[keep]
            )
            found[name] = (found[name], *interval)
    return found


def closeness(latents, reference, groups=None):
    """5th percentile and median of the distance from the nearest reference frame, in latents.

    With groups (the real frames) also the bootstrap interval of the percentile, over patients.
    """
    away = metrics.nearest(latents, reference)
    found = {"5 %": np.quantile(away, 0.05), "50 %": np.median(away)}
    if groups is not None:
        found["5 % interval"] = metrics.bootstrap_interval(
            lambda rows: np.quantile(away[rows], 0.05), groups
        )
    return found


def spread(values):
    """Mean, lowest and highest of the runs."""
    return float(np.mean(values)), float(np.min(values)), float(np.max(values))


if __name__ == "__main__":
    main()
