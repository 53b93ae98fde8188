"""Does synthetic data help classification? Every arm of chapter 10, seed by seed.

--sets holds one set of each generator, `unconditional`, `text`, `text-seg` and `sdm`, at least 200 images of
each class, those with label maps drawn to the maps of the training patients:

    python -m diffecho_utils sample text --checkpoint data/checkpoints/camus/text --n 200 --out SETS/text
    python -m diffecho_utils sample sdm --checkpoint data/checkpoints/camus/sdm --masks ROOT --n 200 --out SETS/sdm

Of each set the same number of images is used, half as many of a class as there are real frames of it; which,
is drawn with the seed. Most arms train the small network of the profile; the paper's five have few steps,
at half the side, for a comparison of sizes and times rather than of arms, and --large-seeds.

Each run (an arm with a seed) is scored on the validation patients; chapters 10 and 11 read their zip.
--steps of every arm: for a trial, not for a record.
"""

from pathlib import Path

import numpy as np
from segmentation import drawn_frames, real_frames, runs_of
from world import QUIET

from diffecho_utils import anatomy, backbones, data, downstream, synthetic

SEEDS, SPLIT = [], "validation"
SETS = ("unconditional", "text", "text-seg", "sdm")
SHARE = 0.5  # synthetic frames for a real one
RECIPES = {
    "small": {"steps": 500, "batch": 16, "learning_rate": 1e-3},
    # As long as a CPU has patience for, which is too short to rank them.
    "resnet18": {"steps": 240, "batch": 32, "learning_rate": 5e-4},
    "resnet50": {"steps": 200, "batch": 16, "learning_rate": 5e-4},
    "vgg16": {"steps": 160, "batch": 16, "learning_rate": 1e-4},
    "vgg19": {"steps": 160, "batch": 16, "learning_rate": 1e-4},
    "efficientnet-b0": {"steps": 400, "batch": 16, "learning_rate": 1e-3},
    # bfloat16 makes its convolutions slower
    backbones.LITE: {"steps": 200, "batch": 16, "learning_rate": 1e-3, "bf16": False},
}
PLAIN = {
    "network": "small",
    "side": None,  # pixels; None: the profile's
    "pretrained": False,  # ImageNet's weights to begin with
    "last": None,  # only the last layers are trained, with so many weights
    "learning_rate": None,  # None: of the network's recipe
    "set": None,
    "alone": False,  # without real frames
    "augment": True,
    "length": 1.0,  # steps for each step of the first arm
}
# Arm: what differs from "real", which has classical augmentation.
STILL, LONGER, ALONE = {"augment": False}, {"length": 1 + SHARE}, {"alone": True}
ARMS = {"real": {}, "real, not augmented": STILL}
ARMS |= {f"real + {name}": {"set": name} for name in SETS}
ARMS |= {f"{name} alone": {"set": name} | ALONE for name in ("text", "text-seg")}
ARMS |= {f"real + {name}, not augmented": {"set": name} | STILL for name in ("text-seg", "sdm")}
ARMS |= {f"{name} alone": {"set": name} | ALONE for name in ("unconditional", "sdm")}
# As many epochs for each real frame as the first arm has
ARMS |= {"real, longer": LONGER, "real + text-seg, longer": {"set": "text-seg"} | LONGER}
for name in backbones.BACKBONES:
    large = {"network": name, "side": 64}
    ARMS |= {f"real, {name}": large, f"real + text-seg, {name}": large | {"set": "text-seg"}}


def rows(world, sets=Path("sets"), seeds=5, large_seeds=3, steps=0):
    return {
        row: settings | {"steps": steps}
        for row, settings in runs_of(ARMS, sets, seeds, PLAIN).items()
        if settings["asked"]["network"] == "small" or settings["seed"] < large_seeds
    }


def compute(world, arm, seed, asked, folder, steps):
    frames, test = real_frames(world)
    real, name = len(frames), asked["network"]
    if folder:
        drawn = drawn_frames(folder, world.profile.side)
        frames = downstream.with_synthetic(frames, drawn, SHARE, seed)
    if asked["alone"]:
        frames = frames.where(np.arange(len(frames)) >= real)
    recipe = dict(RECIPES[name])
    recipe["learning_rate"] = asked["learning_rate"] or recipe["learning_rate"]
    steps = steps or round(recipe.pop("steps") * asked["length"])
    recipe.pop("steps", None)
    how = QUIET | ({} if asked["augment"] else data.STILL) | {"seed": seed, "steps": steps}
    how |= {key: asked[key] for key in ("network", "side", "pretrained", "last")}
    how["points"] = 10 if name == "small" else 4
    run = downstream.classification_run(frames, test, world.profile, recipe=recipe, **how)
    made = {"arm": arm, "synthetic": folder and synthetic.read_settings(folder), "asked": asked}
    known = anatomy.patients_ef(test.masks, test.table).set_index("patient")["ef"]
    return run | made | {"ef": known.round(2).to_dict()}
