"""Does synthetic data help classification? Every arm of chapter 10, seed by seed, on CAMUS.

    python benchmarks/classification.py --data ROOT --sets DIR [--arms NAME ...] [--seeds N]
    python benchmarks/classification.py --pack

DIR holds one set of each generator, `unconditional`, `text`, `text-seg` and `sdm`, at least 200 images of each
class, those with label maps drawn to the maps of the training patients:

    python -m diffecho_utils sample text --checkpoint data/checkpoints/camus/text --n 200 --out DIR/text
    python -m diffecho_utils sample sdm --checkpoint data/checkpoints/camus/sdm --masks ROOT --n 800 --out DIR/sdm

Of each set the same number of images is used, half as many of a class as there are real frames of it; which,
is drawn with the seed. Most arms train the small network of the profile; the paper's five have few steps,
at half the side, for a comparison of sizes and times rather than of arms.

Each run (an arm with a seed) is scored on the validation patients and becomes one file in --out; runs whose
file is there are left out, so the command can be stopped at any moment, repeated, and run twice side by side
with other arms. Without --arms all of them, the first seed of each first; the paper's five have at most
--large-seeds. --pack puts the runs that are there into data/results/camus/cpu/classification.zip, which
chapters 10 and 11 read.
"""

import argparse
import re
from pathlib import Path

import numpy as np
from segmentation import real_frames

from diffecho_utils import (
    assets,
    backbones,
    camus,
    data,
    downstream,
    metrics,
    profiles,
    results,
    synthetic,
)

SETS = ("unconditional", "text", "text-seg", "sdm")
SHARE = 0.5  # synthetic frames for a real one
SMALL = {"steps": 500, "batch": 16, "learning_rate": 1e-3}
# As long as a CPU has patience for, which is too short to rank them.
LARGE = {
    "resnet18": {"steps": 240, "batch": 32, "learning_rate": 5e-4},
    "resnet50": {"steps": 200, "batch": 16, "learning_rate": 5e-4},
    "vgg16": {"steps": 160, "batch": 16, "learning_rate": 1e-4},
    "vgg19": {"steps": 160, "batch": 16, "learning_rate": 1e-4},
    "efficientnet-b0": {"steps": 400, "batch": 16, "learning_rate": 1e-3},
}
PLAIN = {
    "network": "small",
    "side": None,  # pixels; None: the profile's
    "set": None,
    "alone": False,  # without real frames
    "augment": True,
    "length": 1.0,  # steps for each step of the first arm
}
# Arm: what differs from "real", which has classical augmentation.
ARMS = {"real": {}, "real, not augmented": {"augment": False}}
ARMS |= {f"real + {name}": {"set": name} for name in SETS}
ARMS |= {f"{name} alone": {"set": name, "alone": True} for name in ("text", "text-seg")}
ARMS |= {
    f"real + {name}, not augmented": {"set": name, "augment": False} for name in ("text-seg", "sdm")
}
ARMS |= {f"{name} alone": {"set": name, "alone": True} for name in ("unconditional", "sdm")}
ARMS |= {  # as many epochs for each real frame as the first arm has
    "real, longer": {"length": 1 + SHARE},
    "real + text-seg, longer": {"set": "text-seg", "length": 1 + SHARE},
}
for name in backbones.BACKBONES:
    large = {"network": name, "side": 64}
    ARMS |= {f"real, {name}": large, f"real + text-seg, {name}": large | {"set": "text-seg"}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="CAMUS folder")
    parser.add_argument("--sets", type=Path, help="folder of the synthetic sets")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--large-seeds", type=int, default=3, help="of the paper's networks")
    parser.add_argument("--out", type=Path, help="default: _build/runs/classification")
    parser.add_argument("--steps", type=int, help="of every arm, for a trial; not for a record")
    parser.add_argument("--pack", action="store_true", help="only collect the runs that are there")
    options = parser.parse_args()
    out = options.out or assets.workspace() / "runs" / "classification"
    if options.pack:
        print(
            "wrote", results.pack(out, assets.root() / "data/results/camus/cpu/classification.zip")
        )
        return
    profile, table = profiles.get("cpu"), camus.read_table(options.data)
    real, test = real_frames(table, profile)
    fractions = metrics.ejection_fractions(test, test.masks).round(2).to_dict()
    sets = {}
    for seed in range(options.seeds):
        for arm in options.arms:
            name = re.sub(r"[^a-z0-9.]+", "_", arm) + f"-{seed}"
            asked = PLAIN | ARMS[arm]
            large = asked["network"] != "small"
            if (out / f"{name}.json").is_file() or (large and seed >= options.large_seeds):
                continue
            frames, folder = real, asked["set"] and options.sets / asked["set"]
            if folder:
                if folder not in sets:
                    sets[folder] = synthetic.read_frames(folder, profile.side)
                frames = downstream.with_synthetic(real, sets[folder], SHARE, seed)
            if asked["alone"]:
                frames = frames.where(np.arange(len(frames)) >= len(real))
            recipe = dict(LARGE[asked["network"]] if large else SMALL)
            steps = options.steps or round(recipe.pop("steps") * asked["length"])
            recipe.pop("steps", None)
            print(f"{arm}, seed {seed}: {len(frames)} frames, {steps} steps", flush=True)
            run = downstream.classification_run(
                frames,
                test,
                profile,
                network=asked["network"],
                side=asked["side"],
                seed=seed,
                steps=steps,
                points=4 if large else 10,
                recipe=recipe,
                progress=lambda line: None,
                **({} if asked["augment"] else data.STILL),
            )
            made = synthetic.read_settings(folder) if folder else None
            results.save(
                out,
                name,
                run | {"arm": arm, "synthetic": made, "asked": asked, "ef": fractions},
                world=table.attrs["world"],
                profile=profile.name,
                command="python benchmarks/classification.py --data /path/to/camus --sets DIR",
                seeds=[seed],
                split="validation",
            )
            scores = run["scores"]["class"] | {"phase": run["scores"]["phase"]["accuracy"]}
            found = ", ".join(f"{score} {value:.3f}" for score, value in scores.items())
            print(f"  {found}, {run['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
