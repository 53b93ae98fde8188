"""Every network that the book ships, trained anew and in order: one command, repeated until it is done.

    python experiments/run.py trainings --data /path/to/camus --images 640000 --batch 64

A row is one `train` command. The four generators see the same number of images, whatever the batch that
suits the machine; the other networks keep to the profile's recipes. Killed, the command goes on where it was.
A network lies beside those that it builds on, in _build/trainings; who ships it judges it first.
"""

import pandas as pd

from diffecho_utils import DiffEchoError, assets, camus, checkpoints, models, profiles, training
from diffecho_utils.__main__ import main

SEEDS, SPLIT = [], "training"


def rows(world, images=640000, batch=64, seed=0):
    settings = {"images": images, "batch": batch, "seed": seed}
    return {network: {"network": network} | settings for network in training.MODELS}


def compute(world, network, images, batch, seed):
    folder = assets.workspace() / "trainings" / f"{world.name}-{world.profile.name}-{images}-{seed}"
    words = ["train", network, "--data", world.table.attrs["root"], "--out", folder / network]
    words += ["--profile", world.profile.name, "--stretch", "--seed", seed]
    if network in models.GENERATORS:
        words += ["--batch", batch, "--steps", *steps(world.profile, network, images // batch)]
    for name in training.builds_on(network, world.profile):
        words += [f"--{name}", folder / name]
    if main([str(word) for word in words]):
        raise DiffEchoError(f"{network} was not trained; mend what is said above, and repeat")
    log = checkpoints.read_training(folder / network)["log"]
    return checkpoints.budget(folder / network) | {"loss": [*log.values()][-1][-1]["loss"]}


def steps(profile, network, total):
    """Steps of each stage: `total` in the proportions of the recipe, over the networks of the stage."""
    recipes, networks = profiles.recipes(profile, network), {"unconditional": len(camus.CLASSES)}
    images = {stage: recipe.steps * recipe.batch for stage, recipe in recipes.items()}
    whole = sum(n * networks.get(stage, 1) for stage, n in images.items())
    later = {stage: max(1, total * n // whole) for stage, n in list(images.items())[1:]}
    return [total - sum(n * networks.get(network, 1) for n in later.values()), *later.values()]


def collect(world, found):
    print(pd.DataFrame(found).T.to_string())
    return {}
