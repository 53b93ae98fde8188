"""What each recipe of a profile takes on this machine: images a second, memory, minutes.

Every network of --profile (on a CPU: smoke) is trained on phantom frames for some steps of its own batch.
"recipe / min" is what the whole recipe would take at that speed.
"""

import statistics
import tempfile
from pathlib import Path

import pandas as pd
from world import QUIET

from diffecho_utils import DiffEchoError, camus, checkpoints, data, profiles, results, training

WORLD, SEEDS, SPLIT = "phantom", [], None


def rows(world, steps=20):
    return {"recipes": {"steps": steps, "machine": results.hardware()}}


def compute(world, steps, machine):
    """{stage: row of the table}; an error, such as that of too little memory, in its place."""
    frames = data.load_frames(camus.select(world.table, patients=16), world.profile)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for model in training.MODELS:
            try:
                found |= measured(world.profile, model, frames, Path(folder), steps)
            except DiffEchoError as error:
                found[model] = {"error": str(error).split(";")[0]}
    return found


def measured(profile, model, frames, folder, steps):
    recipes = profiles.recipes(profile, model)
    brief = profiles.adapt(profile, model, steps=[steps] * len(recipes))
    needs = {name: folder / name for name in training.builds_on(model, profile)}
    log = training.train(model, frames, brief, folder / model, needs=needs, **QUIET)
    memory, found = checkpoints.read_training(folder / model)["peak_memory_gib"], {}
    for stage, of_stage in log.groupby("stage", sort=False):
        recipe = recipes.get(stage) or [*recipes.values()][-1]  # text-seg's, or each class's
        seen = recipe.steps * recipe.batch * recipe.accumulation
        speed = statistics.median(of_stage["images_per_second"])
        told = {"recipe / images": f"{seen:,}", "recipe / min": round(seen / speed / 60, 1)}
        row = {"batch": recipe.batch, "images / s": round(speed, 1), "GiB": memory}
        found[stage] = row | told
    return found


def collect(world, found):
    print(f"{results.hardware()}, profile {world.profile.name}, {world.profile.side} pixels")
    print(pd.DataFrame(found["recipes"]).T.to_string())
    return {}
