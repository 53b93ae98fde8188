"""Trainings with one thing changed, which chapters 03 and 04 quote and do not run.

Flips: the shipped 4CH-ES network trained on, without and with a mirrored copy of every frame, as the
paper's random flips show them to the network; and once more with them from random weights. How many of
the images are then mirrored, by chapter 03's side score?
Words: the shipped text model trained on with prompts whose four keywords are strings of six letters, an
option of the paper's public code. Does a frozen classifier recognise what the strings ask for?
Measured on images from fixed seeds. Records: ablation_flips, ablation_words. 25 minutes on one core.
"""

import tempfile
from dataclasses import replace

import numpy as np
import torch
from safetensors import safe_open
from torch.nn import functional as F
from world import QUIET

from diffecho_utils import (
    assets,
    camus,
    checkpoints,
    data,
    downstream,
    intervals,
    models,
    objectives,
    profiles,
    prompts,
    sampling,
    synthetic,
    training,
)

KNOWN = assets.features("camus", "cpu", "03_features")
SEEDS, SPLIT, USES = [5000], "training", ("autoencoder", "classifier", KNOWN)
STRINGS = "random strings, trained on"
CLASS, IMAGES, GUIDANCE = camus.CLASS_NAMES.index("4CH-ES"), 200, 3.0


def rows(world, flip_minutes=4.0, word_minutes=8.0, learning_rate=3e-4):
    """The minutes are those of each training."""
    flips, words = {"model": "unconditional"}, {"model": "text"}
    trained = {"minutes": flip_minutes, "learning_rate": learning_rate}
    return {
        "as shipped": flips,
        "trained on, without flips": flips | trained,
        "trained on, with flips": flips | trained | {"flips": True},
        "from random weights, with flips": flips | trained | {"flips": True, "fresh": True},
        "words": words | {"template": "paper"},
        "random strings, never trained": words | {"template": "random"},
        STRINGS: words | {"template": "random"} | trained | {"minutes": word_minutes},
    }


def compute(world, model, **settings):
    return {"unconditional": flipped, "text": worded}[model](world, **settings)


def flipped(world, minutes=None, learning_rate=None, flips=False, fresh=False):
    generator = world.generator("unconditional")
    if minutes is None:
        return sides(generator, CLASS)
    torch.manual_seed(0)
    network, recipe = models.build_unconditional(world.profile), world.profile.unconditional
    if not fresh:
        network.load_state_dict(generator.denoiser.unets[CLASS].state_dict())
    objective = objectives.DiffusionObjective(models.Unconditional([network]), generator.scheduler)
    rate = (3 if fresh else 1) * learning_rate
    recipe = replace(recipe, batch=64, learning_rate=rate, ema=0.99)
    tensors = {"latents": latents(world, flips)}
    steps = training.steps_within(minutes, training.Stage("flips", objective, tensors, recipe))
    training.fit(objective, tensors, replace(recipe, steps=steps), None, **QUIET)
    return sides(replace(generator, denoiser=objective.network), 0) | {"steps": steps}


def latents(world, flips):
    """Those of the class's training frames, jittered; with flips each of them also mirrored."""
    frames = world.frames("training", like=world.generator("text"))
    mine, views = frames.where(frames.classes.numpy() == CLASS), world.profile.jittered_views
    plain = data.latent_views(world.vae, mine, views, **training.JITTER)["latents"]
    mirrored = data.encode(world.vae, mine.images.flip(-1)).repeat(views, 1, 1, 1)
    return torch.cat([plain, mirrored]) if flips else plain


def sides(generator, index):
    """How many of the images of a class are mirrored, and how bright they are, for fixed seeds."""
    with safe_open(KNOWN, "pt") as file:
        weights = file.get_tensor("side_weights")[CLASS]
    seeds = SEEDS[0] + np.arange(IMAGES)
    images = sampling.sample(generator, seeds, 20, guidance=1, classes=np.full(IMAGES, index))
    coarse = F.adaptive_avg_pool2d(images, 16)
    scores = (coarse - coarse.flip(-1))[..., :8].flatten(1) @ weights
    mirrored, light = float((scores < 0).float().mean()), float(127.5 * (1 + images.mean()))
    return {"mirrored": mirrored, "side_scores": scores.numpy().round(4), "brightness": light}


def worded(world, template, minutes=None, learning_rate=None):
    """Shares of view and phase recognised: (share, low, high), 95 % intervals over images."""
    table, _ = synthetic.plan("text", IMAGES // len(camus.CLASSES))
    shipped = place = assets.checkpoint("camus", "text")
    with tempfile.TemporaryDirectory() as folder:
        if minutes:
            place = folder
            training.train(
                "text",
                world.frames("training", like=world.generator("text")),
                profiles.adapt(world.profile, "text", batch=64, learning_rate=learning_rate),
                folder,
                needs={need: checkpoints.needed(shipped, need) for need in training.MODELS["text"]},
                start=shipped,
                minutes=minutes,
                cache_dir=assets.workspace() / "cache",
                templates=(template,),
                **QUIET,
            )
        generator = checkpoints.load_generator(place)
        recipe = checkpoints.read_training(place)["recipes"]["text"]
    seeds, given = SEEDS[0] + np.arange(IMAGES), prompts.make(table, template)
    images = sampling.sample(generator, seeds, 20, guidance=GUIDANCE, prompts=given)
    answers = downstream.classify(world.judges[1], images).argmax(1).numpy()
    classes, found = camus.class_index(table), {}
    for part, of in (("view", lambda c: c // 2), ("phase", lambda c: c % 2)):
        hits = of(answers) == of(np.asarray(classes))
        found[part] = intervals.share(hits)
    return {"recognised": found, "recipe": recipe}


def collect(world, found):
    trained = {name: row for name, row in found.items() if "mirrored" in row}
    told = {name: row["recognised"] for name, row in found.items() if "recognised" in row}
    words = {"guidance": GUIDANCE, "recognised": told, "recipe": found[STRINGS]["recipe"]}
    flips = {"class": camus.CLASS_NAMES[CLASS], "images": IMAGES, "trained": trained}
    return {"ablation_flips": flips, "ablation_words": {"images": IMAGES} | words}
