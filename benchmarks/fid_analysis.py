"""The whole panel of image metrics for the four shipped generators, in three kinds of features.

    python benchmarks/fid_analysis.py --data ROOT                  (25 minutes on one core)
    python benchmarks/fid_analysis.py --data ROOT --features-only  (one minute)

Each generator draws one image for each frame of the validation patients, in three runs of seeds, as in
generators.py. The second form only writes what the real frames look like to the encoders, which
chapter 08 reads in place of the frames: 08_features.safetensors. The first also writes
fid_analysis.json, beside it. Images are kept in _build/drawn, which
generators.py shares, so that an interrupted run, started again, goes on.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from generators import RUNS, closeness, drawn, judged, patients, spread

from diffecho_utils import (
    anatomy,
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
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="CAMUS folder")
    parser.add_argument("--features-only", action="store_true", help="no generator")
    parser.add_argument("--out", type=Path, help="where the record goes; default: data/results")
    parser.add_argument("--patients", type=int, help="only so many of each split, to try it out")
    parser.add_argument("--steps", type=int, help="solver steps; default: profile cpu's")
    options = parser.parse_args()
    profile, table = profiles.get("cpu"), camus.read_table(options.data)
    profile = replace(profile, sampling_steps=options.steps or profile.sampling_steps)
    out = options.out or assets.root() / "data" / "results" / "camus" / profile.name
    encoders = load_encoders()
    known, unseen = (
        data.load_frames(
            camus.select(table, split, patients=options.patients),
            encoders["judges"][0],
            cache_dir=assets.workspace() / "cache",
        )
        for split in ("training", "validation")
    )
    wanted = ("classifier", "clip") if options.features_only else encoders["see"]
    real = {name: [encoders["see"][name](f.images) for f in (known, unseen)] for name in wanted}
    write_features(out, real, known, unseen, table.attrs["world"])
    if options.features_only:
        return
    measured = [name for name in real if name != "latents"]
    values = {"frames": len(unseen), "steps": profile.sampling_steps}
    values["real"] = {
        "images": of_images(unseen.images, unseen, encoders, masked=True),
        "nearest": closeness(
            *(torch.from_numpy(x) for x in real["latents"][::-1]), patients(unseen)
        ),
        "spoilt": spoilt(unseen, real, encoders),
    }
    values["panel"] = {name: {} for name in measured}
    for model in models.GENERATORS:
        generator = checkpoints.load_generator(assets.checkpoint("camus", model))
        runs = [drawn(generator, unseen, profile.sampling_steps, seed) for seed in RUNS]
        masked = "masks" in sampling.CONDITIONS[model]
        whole = [of_images(images, unseen, encoders, masked) for images in runs]
        values[model] = {"images": gathered(whole)}
        latents = [torch.from_numpy(encoders["see"]["latents"](images)) for images in runs]
        nearest = [closeness(x, torch.from_numpy(real["latents"][0])) for x in latents]
        values[model]["nearest"] = gathered(nearest)
        for name in measured:
            tables = [
                metrics.panel(
                    encoders["see"][name](images),
                    unseen.classes.numpy(),
                    real[name][0],
                    known.classes.numpy(),
                    real[name][1],
                    unseen.classes.numpy(),
                    patients(unseen),
                )
                for images in runs
            ]
            values["panel"][name][model] = gathered([t.to_dict("index") for t in tables])
            excess = [(t["distance"] - t["floor"]).drop("all") for t in tables]
            values[model].setdefault("worst", {})[name] = [e.idxmax() for e in excess]
        print(model, values[model], flush=True)
    path = results.save(
        out,
        "fid_analysis",
        values,
        world=table.attrs["world"],
        profile=profile.name,
        command="python benchmarks/fid_analysis.py --data /path/to/camus",
        seeds=RUNS,
        split="validation",
    )
    print(f"wrote {path}")


def load_encoders():
    """{"see": {name: images -> (N, D)}, "judges": (segmenter, classifier)}, all shipped."""
    at = assets.checkpoint
    segmenter, classifier = (
        checkpoints.load_network(at("camus", n)) for n in ("segmenter", "classifier")
    )
    vae = checkpoints.load_autoencoder(at("camus", "autoencoder"))
    clip, _ = checkpoints.load_clip(at("camus", "clip"))
    see = {
        "classifier": lambda images: metrics.network_features(classifier, images),
        "autoencoder": lambda images: metrics.features(vae, images),
        "clip": lambda images: metrics.clip_features(clip, images),
        "latents": lambda images: data.encode(vae, images).flatten(1).numpy(),
    }
    return {"see": see, "judges": (segmenter, classifier)}


def write_features(out, real, known, unseen, world):
    """What the classifier and CLIP see in each frame, in the order of 03_features.safetensors."""
    both, clip = (known, unseen), metrics.fitted(real["clip"][0])
    owners = np.concatenate([patients(frames) for frames in both])
    order = list(dict.fromkeys(owners))
    tensors = {
        "features": torch.from_numpy(np.concatenate(real["classifier"])).half(),
        "classes": torch.cat([frames.classes for frames in both]).byte(),
        "split": torch.repeat_interleave(
            torch.arange(2), torch.tensor([len(f) for f in both])
        ).byte(),
        "patient": torch.tensor([order.index(owner) for owner in owners], dtype=torch.int16),
        # All that a Frechet distance needs of the training frames
        "clip_mean": torch.from_numpy(clip.mean).float(),
        "clip_root": torch.from_numpy(clip.root).float(),
    }
    facts = {"world": world, "licence": results.LICENCES.get(world, "")}
    facts |= {
        name: checkpoints.weights_digest(assets.checkpoint("camus", name))
        for name in ("classifier", "clip")
    }
    files.save_tensors(out / "08_features.safetensors", tensors, facts)


def of_images(images, frames, encoders, masked):
    """What is measured on the images themselves, and as the judges read them."""
    found = judged(images, frames, encoders["judges"], masked)
    grey = 127.5 * (images.mean((1, 2, 3)).numpy() + 1)
    kinds = frames.classes.numpy()
    for index, name in enumerate(camus.CLASS_NAMES):
        mine = kinds == index
        found[f"similarity, {name}"] = metrics.self_similarity(images[mine])
        found[f"brightness, {name}"] = grey[mine].mean()
    if masked:
        read = downstream.segment(encoders["judges"][0], images)
        asked, got = (metrics.ejection_fractions(frames, m) for m in (frames.masks, read))
        pair = np.array([asked, got])
        pair = pair[:, np.isfinite(pair).all(0)]
        found |= {"EF, patients": pair.shape[1], "EF, error": np.abs(pair[1] - pair[0]).mean()}
        found["EF, correlation"] = np.corrcoef(pair)[0, 1]
        areas = [anatomy.areas(m) for m in (frames.masks, read)]
        error = np.abs(areas[1] - areas[0]).mean(0) / areas[0].mean(0)
        found |= {
            f"area error, {part}": e
            for part, e in zip(("LV cavity", "myocardium", "LA"), error, strict=True)
        }
    return found


def spoilt(frames, real, encoders):
    """{what was done: {encoder: Frechet distance from the same held-out frames, untouched}}."""
    return {
        done: {
            name: metrics.frechet_distance(see(images), real[name][1])
            for name, see in encoders["see"].items()
            if name != "latents"
        }
        for done, images in metrics.spoilt(frames.images).items()
    }


def gathered(runs):
    """Mean, lowest and highest of the runs' numbers, in the nesting of one run."""
    first = runs[0]
    if isinstance(first, dict):
        return {name: gathered([run[name] for run in runs]) for name in first}
    return spread(runs)


if __name__ == "__main__":
    main()
