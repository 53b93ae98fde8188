"""The four shipped generators side by side, and 20 steps of a fast solver against the paper's step counts.

Each generator draws one image for each frame of the validation patients, in three runs of seeds: the same
classes, and for those that read them the same prompts and label maps. Measured is what the shipped judges
see, how close the images come to the nearest training frame, and the whole panel of image metrics in three
kinds of features, with the floor of real held-out frames, also by the number of images and by the patients'
ejection fraction. Records: generators (chapter 06), fid_analysis (chapter 08), and 08_features.safetensors,
what the real frames look like to the classifier and to CLIP, which chapter 08 reads in place of the frames.
An hour on one core, a third of it the paper's steps.
"""

import time

import numpy as np
import torch
from world import by_structure, dice_of, draw, gathered, patients, thinned

from diffecho_utils import (
    anatomy,
    assets,
    camus,
    checkpoints,
    data,
    downstream,
    files,
    intervals,
    metrics,
    models,
    results,
    sampling,
)

USES = ("segmenter", "classifier", "autoencoder", "clip")
SEEDS, SPLIT = (1000, 2000, 3000), "validation"  # of the first image of each run
# Solver and steps of the paper's own sampling, for each of its models.
PAPER = {"unconditional": ("DDPM", 1000), "text": ("PNDM", 40), "text-seg": ("DDIM", 50)}
ENCODERS = ("classifier", "autoencoder", "clip")


def rows(world):
    named, ours = {"real": {}}, ("DPM-Solver++", world.profile.sampling_steps)
    for model in models.GENERATORS:
        named |= {f"{model}, {seed}": {"model": model, "seed": seed} for seed in SEEDS}
    for model, theirs in PAPER.items():
        for solver, steps in (ours, theirs):
            settings = {"model": model, "solver": solver, "steps": steps}
            named[f"{model}: {solver}, {steps}"] = settings
    return named


def compute(world, model=None, seed=None, solver=None, steps=None):
    if solver:
        return timed(world, model, solver, steps)
    frames, real = world.frames("validation"), model is None
    masked = not real and "masks" in sampling.CONDITIONS[model]
    images = frames.images if real else world.drawn(model, "validation", seed)
    found = {
        "images": of_images(world, images, frames, real or masked),
        "nearest": closeness(world, images, patients(frames) if real else None),
        "panel": {name: panel(world, name, images, masked) for name in ENCODERS},
        "by_number": {name: by_number(world, name, images) for name in ENCODERS},
    }
    if real or masked:
        found["by_ef"] = by_ef(world, images, frames)
    return found | {"frames": len(frames), "spoilt": spoilt(world, frames)} if real else found


def timed(world, model, solver, steps):
    """Distance and seconds of an image for each frame of every second patient."""
    frames = world.frames("validation")
    half = frames.where(thinned(frames, 2))
    seeds, started = SEEDS[0] + np.arange(len(half)), time.perf_counter()
    images = draw(world.generator(model), half, seeds, steps, solver)
    seconds = (time.perf_counter() - started) / len(half)
    known, found = world.seen("autoencoder", "training"), world.see["autoencoder"](images)
    distance = metrics.frechet_distance(found, known)
    return {"distance": distance, "seconds_an_image": seconds, "images": len(half)}


def of_images(world, images, frames, masked):
    """What is measured on the images themselves, and as the judges read them."""
    segmenter, classifier = world.judges
    found = downstream.class_accuracies(downstream.classify(classifier, images), frames.classes)
    if masked:
        found |= by_structure(np.nanmean(dice_of(segmenter, images, frames), 0))
    grey, kinds = 127.5 * (images.mean((1, 2, 3)).numpy() + 1), frames.classes.numpy()
    for index, name in enumerate(camus.CLASS_NAMES):
        found[f"similarity, {name}"] = metrics.self_similarity(images[kinds == index])
        found[f"brightness, {name}"] = grey[kinds == index].mean()
    if masked:
        maps = (frames.masks, downstream.segment(segmenter, images))
        pair = np.array([anatomy.patients_ef(m, frames.table)["ef"] for m in maps])
        asked, read = pair[:, np.isfinite(pair).all(0)]
        found["EF, patients"], found["EF, error"] = len(asked), np.abs(read - asked).mean()
        found["EF, correlation"] = np.corrcoef(asked, read)[0, 1]
        given, drawn = (anatomy.areas(m) for m in maps)
        errors = np.abs(drawn - given).mean(0) / given.mean(0)
        for part, error in zip(("LV cavity", "myocardium", "LA"), errors, strict=True):
            found[f"area error, {part}"] = error
    return found


def closeness(world, images, groups=None):
    """5th percentile and median of the distance from the nearest training frame, in latents.

    With groups (of real frames, their patients) also the bootstrap interval of the percentile.
    """
    away = metrics.nearest(world.see["latents"](images), world.seen("latents", "training"))
    found = {"5 %": np.quantile(away, 0.05), "50 %": np.median(away)}
    if groups is not None:
        found["5 % interval"] = intervals.bootstrap(
            lambda rows: np.quantile(away[rows], 0.05), groups
        )[1:]
    return found


def panel(world, encoder, images, masked):
    """{class: its row of the panel}, in the features of an encoder; masked: drawn to patients' maps."""
    known, unseen = (world.frames(split) for split in ("training", "validation"))
    reference = world.seen(encoder, "training"), known.classes.numpy()
    held_out = world.seen(encoder, "validation"), unseen.classes.numpy()
    mine, owners = (world.see[encoder](images), unseen.classes.numpy()), patients(unseen)
    rows = metrics.panel(*mine, *reference, *held_out, owners, owners if masked else None)
    return rows.to_dict("index")


def by_number(world, encoder, images):
    """{N: mean distance of so many of the images, equally many of each class}, of draws at random."""
    seen, known = world.see[encoder](images), metrics.fitted(world.seen(encoder, "training"))
    classes, rng = world.frames("validation").classes.numpy(), np.random.default_rng(0)
    kinds, counts = np.unique(classes, return_counts=True)
    sizes = len(kinds) * np.unique((counts.min() * np.arange(1, 6) + 4) // 5)
    draws = {n: [metrics.balanced(classes, n, rng) for _ in range(20)] for n in sizes}
    return {
        str(n): np.mean([metrics.frechet_distance(seen[rows], known) for rows in of])
        for n, of in draws.items()
    }


def by_ef(world, images, frames):
    """{third of the patients by the EF of their label maps: what their frames or images score}."""
    owned = anatomy.patients_ef(frames.masks, frames.table).dropna(subset="ef")
    thirds, found = np.array_split(owned["ef"].argsort(), 3), {}
    seen, known = (
        world.see["classifier"](images),
        metrics.fitted(world.seen("classifier", "training")),
    )
    dice = np.nanmean(dice_of(world.judges[0], images, frames), 1)
    hits = (downstream.classify(world.judges[1], images).argmax(1) == frames.classes).numpy()
    for name, ranked in zip(("lowest EF", "middle EF", "highest EF"), thirds, strict=True):
        third = owned.iloc[ranked]
        rows = np.isin(patients(frames), third["patient"])
        of = {"patients": len(third), "mean EF": third["ef"].mean(), "mean Dice": dice[rows].mean()}
        of |= {"class recognised": hits[rows].mean()}
        found[name] = of | {"distance": metrics.frechet_distance(seen[rows], known)}
    return found


def spoilt(world, frames):
    """{what was done: {encoder: Frechet distance from the same held-out frames, untouched}}."""
    real = {name: world.seen(name, "validation") for name in ENCODERS}
    return {
        done: {n: metrics.frechet_distance(world.see[n](images), real[n]) for n in ENCODERS}
        for done, images in data.spoilt(frames.images).items()
    }


def collect(world, found):
    write_features(world)
    real, steps = found["real"], world.profile.sampling_steps
    nearest, floors = real["nearest"], real["panel"]["autoencoder"]
    floor = {k: [of["floor"], of["floor_low"], of["floor_high"]] for k, of in floors.items()}
    both = {"frames": real["frames"], "steps": steps}
    dials = {model: world.generator(model).guidance for model in models.GENERATORS}
    brief = {"guidance": dials, "real": {"floor": floor, "nearest": nearest} | seen(real)}
    fid = {"real": {name: real[name] for name in ("images", "nearest", "spoilt")}}
    fid["panel"] = {name: {} for name in ENCODERS}
    fid["by_number"] = {name: {"real": real["by_number"][name]} for name in ENCODERS}
    fid["by_ef"] = {"real": real["by_ef"]}
    for model in models.GENERATORS:
        runs = [found[f"{model}, {seed}"] for seed in SEEDS]
        of_runs = gathered(runs)
        distance = {kind: of["distance"] for kind, of in of_runs["panel"]["autoencoder"].items()}
        brief[model] = seen(of_runs) | {"distance": distance, "nearest": of_runs["nearest"]["5 %"]}
        fid[model] = {name: of_runs[name] for name in ("images", "nearest")}
        fid[model]["worst"] = {name: [worst(run, name) for run in runs] for name in ENCODERS}
        for name in ENCODERS:
            fid["panel"][name][model] = of_runs["panel"][name]
            fid["by_number"][name][model] = of_runs["by_number"][name]
        if "by_ef" in of_runs:
            fid["by_ef"][model] = of_runs["by_ef"]
    brief["steps_compared"] = {
        model: {row.split(": ")[1]: of for row, of in found.items() if row.startswith(f"{model}: ")}
        for model in PAPER
    }
    return {"generators": both | brief, "fid_analysis": both | fid}


def seen(row):
    """Of what was measured on images, what the judges recognise and the Dice."""
    names = ("view", "phase", "class", *downstream.STRUCTURES)
    return {name: row["images"][name] for name in names if name in row["images"]}


def worst(run, encoder):
    """The class whose distance is farthest above its floor."""
    rows = run["panel"][encoder]
    return max(camus.CLASS_NAMES, key=lambda kind: rows[kind]["distance"] - rows[kind]["floor"])


def write_features(world):
    """08_features.safetensors, in the order of 03_features.safetensors."""
    splits = ("training", "validation")
    parts, clip = [world.frames(s) for s in splits], metrics.fitted(world.seen("clip", "training"))
    owners = np.concatenate([patients(frames) for frames in parts])
    order = {owner: index for index, owner in enumerate(dict.fromkeys(owners))}
    seen = np.concatenate([world.seen("classifier", split) for split in splits])
    which = torch.repeat_interleave(torch.arange(2), torch.tensor([len(f) for f in parts]))
    tensors = {
        "features": torch.from_numpy(seen).half(),
        "classes": torch.cat([frames.classes for frames in parts]).byte(),
        "split": which.byte(),
        "patient": torch.tensor([order[owner] for owner in owners], dtype=torch.int16),
        # All that a Frechet distance needs of the training frames
        "clip_mean": torch.from_numpy(clip.mean).float(),
        "clip_root": torch.from_numpy(clip.root).float(),
    }
    facts = {"world": world.name, "licence": results.LICENCES.get(world.name, "")}
    for name in ("classifier", "clip"):
        facts[name] = checkpoints.weights_digest(assets.checkpoint("camus", name))
    files.save_tensors(world.out / "08_features.safetensors", tensors, facts)
