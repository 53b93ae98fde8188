"""Trainings with one thing changed, which the chapters quote and do not run.

    python benchmarks/ablations.py flips --data ROOT --minutes 6      (three such trainings, for chapter 03)
    python benchmarks/ablations.py words --data ROOT --minutes 15     (one such training, for chapter 04)

flips: the shipped 4CH-ES network trained on, without and with a mirrored copy of every frame, as the
paper's random flips show them to the network; and once more with them from random weights. How many of
the images are then mirrored, by chapter 03's side score?
words: the shipped text model trained on with prompts whose four keywords are strings of six letters, an
option of the paper's public code. Does a frozen classifier recognise what the strings ask for?

Measured on images from fixed seeds; written to data/results/camus/cpu/ablation_NAME.json.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch.nn import functional as F

from diffecho_utils import (
    assets,
    camus,
    checkpoints,
    data,
    downstream,
    metrics,
    models,
    objectives,
    profiles,
    prompts,
    results,
    sampling,
    synthetic,
    training,
)

CLASS = camus.CLASS_NAMES.index("4CH-ES")
SEEDS = np.arange(5000, 5200)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=("flips", "words"))
    parser.add_argument("--data", type=Path, required=True, help="CAMUS folder")
    parser.add_argument("--minutes", type=float, required=True, help="of each training")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    options = parser.parse_args()
    profile = profiles.get("cpu")
    rows = camus.select(camus.read_table(options.data), "training")
    generator = checkpoints.load_generator(assets.checkpoint("camus", "text"))
    frames = data.load_frames(rows, generator, cache_dir=assets.workspace() / "cache")
    values = {"flips": flips, "words": words}[options.name](frames, profile, options)
    results.save(
        assets.root() / "data" / "results" / "camus" / profile.name,
        f"ablation_{options.name}",
        values,
        world=frames.table.attrs["world"],
        profile=profile.name,
        command=f"python benchmarks/ablations.py {options.name} --data /path/to/camus "
        f"--minutes {options.minutes:g}",
        seeds=[int(SEEDS[0])],
        split="training",
    )


def flips(frames, profile, options):
    """Shares of mirrored images, before and after training with and without mirrored frames."""
    generator = checkpoints.load_generator(assets.checkpoint("camus", "unconditional"))
    mine = frames.where(frames.classes.numpy() == CLASS)
    views = data.latent_views(generator.vae, mine, profile.jittered_views, **training.JITTER)
    mirrored = data.encode(generator.vae, mine.images.flip(-1))
    plain = views["latents"]
    both = torch.cat([plain, mirrored.repeat(profile.jittered_views, 1, 1, 1)])
    with safe_open(assets.features("camus", "cpu", "03_features"), "pt") as file:
        weights = file.get_tensor("side_weights")[CLASS]
    unet = generator.denoiser.unets[CLASS]
    trained = {"as shipped": measure(generator, weights)}
    for name, tensor, fresh in (
        ("trained on, without flips", plain, False),
        ("trained on, with flips", both, False),
        ("from random weights, with flips", both, True),
    ):
        torch.manual_seed(0)
        network = models.build_unconditional(profile)
        if not fresh:
            network.load_state_dict(unet.state_dict())
        objective = objectives.DiffusionObjective(
            models.Unconditional([network]), generator.scheduler
        )
        recipe = replace(
            profile.unconditional,
            batch=64,
            learning_rate=(3 if fresh else 1) * options.learning_rate,
            ema=0.99,
        )
        stage = training.Stage(name, objective, {"latents": tensor}, recipe)
        steps = training.steps_within(options.minutes, stage)
        training.fit(objective, stage.tensors, replace(recipe, steps=steps), None)
        changed = replace(generator, denoiser=objective.network)
        trained[name] = measure(changed, weights, only=True) | {"steps": steps}
        print(name, trained[name], flush=True)
    return {"class": camus.CLASS_NAMES[CLASS], "images": len(SEEDS), "trained": trained}


def measure(generator, weights, only=False):
    """How many of the images are mirrored, and how bright they are, for fixed seeds."""
    classes = np.full(len(SEEDS), 0 if only else CLASS)
    images = sampling.sample(generator, SEEDS, 20, classes=classes)
    coarse = F.adaptive_avg_pool2d(images, 16)
    sides = (coarse - coarse.flip(-1))[..., :8].flatten(1) @ weights
    return {
        "mirrored": float((sides < 0).float().mean()),
        "side_scores": sides.numpy().round(4),
        "brightness": float(127.5 * (1 + images.mean())),
    }


def words(frames, profile, options):
    """Share of view and phase recognised: words, strings never seen, and strings trained on."""
    checkpoint = assets.checkpoint("camus", "text")
    judge = checkpoints.load_network(assets.checkpoint("camus", "classifier"))
    table, _ = synthetic.plan("text", len(SEEDS) // 4)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        training.train(
            "text",
            frames,
            profiles.adapt(profile, "text", batch=64, learning_rate=options.learning_rate),
            folder,
            needs={name: checkpoints.needed(checkpoint, name) for name in training.MODELS["text"]},
            start=checkpoint,
            minutes=options.minutes,
            cache_dir=assets.workspace() / "cache",
            templates=("random",),
        )
        recipe = checkpoints.read_training(folder)["recipes"]["text"]
        for name, place, template in (
            ("words", checkpoint, "paper"),
            ("random strings, never trained", checkpoint, "random"),
            ("random strings, trained on", folder, "random"),
        ):
            generator = checkpoints.load_generator(place)
            given = prompts.make(table, template)
            images = sampling.sample(generator, SEEDS, 20, guidance=3.0, prompts=given)
            found[name] = recognised(downstream.classify(judge, images), camus.class_index(table))
            print(name, found[name], flush=True)
    return {"images": len(SEEDS), "guidance": 3.0, "recognised": found, "recipe": recipe}


def recognised(probabilities, classes):
    """{view, phase}: (share recognised, low, high), 95 % bootstrap intervals over images."""
    rows = {}
    for part, of in (("view", lambda c: c // 2), ("phase", lambda c: c % 2)):
        hits = of(probabilities.argmax(1).numpy()) == of(np.asarray(classes))
        interval = metrics.bootstrap_interval(lambda r, h=hits: h[r].mean(), range(len(hits)))
        rows[part] = (hits.mean(), *interval)
    return rows


if __name__ == "__main__":
    main()
