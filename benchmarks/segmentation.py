"""Does synthetic data help segmentation? Every arm of chapter 09, seed by seed, on CAMUS.

    python benchmarks/segmentation.py --data ROOT --sets DIR [--arms NAME ...] [--seeds N]

DIR holds the sets `text-seg` and `sdm` that `sample` drew to the label maps of the training patients, 800
images of each class:

    python -m diffecho_utils sample sdm --checkpoint data/checkpoints/camus/sdm --masks ROOT --n 800 --out DIR/sdm

Each run (an arm with a seed) is trained for the same number of optimiser steps on the training patients, and
scored on the validation patients. It becomes one file below data/results/camus/cpu/segmentation; runs
whose file is there are left out, so the command can be stopped at any moment and repeated. Without --arms all
of them, the first seed of each first.
"""

import argparse
import re
from pathlib import Path

from diffecho_utils import assets, camus, data, downstream, profiles, results, sampling

STILL = dict.fromkeys(("degrees", "shift", "zoom", "gain", "contrast"), 0.0)
SETS = ("text-seg", "sdm")
# Arm: what differs from "real", which has classical augmentation and the tuned recipe.
ARMS = {"real": {}, "real, not augmented": {"augment": False}, "real, paper": {"recipe": "paper"}}
for name in SETS:
    ARMS |= {f"{name} alone": {"set": name, "share": None}}
    ARMS |= {f"real + {share:g} {name}": {"set": name, "share": share} for share in (1.0, 0.5, 2.0)}
    one = {"set": name, "share": 1.0}
    ARMS |= {f"real + 1 {name}, not augmented": one | {"augment": False}}
    ARMS |= {f"real + 1 {name}, paper": one | {"recipe": "paper"}}
    ARMS |= {f"real + 1 {name}, epochs matched": one | {"match_epochs": True}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="CAMUS folder")
    parser.add_argument("--sets", type=Path, required=True, help="folder of text-seg and sdm")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=800, help="of the optimiser, in every arm")
    parser.add_argument("--out", type=Path, help="default: data/results/camus/cpu/segmentation")
    options = parser.parse_args()
    profile, table = profiles.get("cpu"), camus.read_table(options.data)
    out = options.out or assets.root() / "data/results/camus" / profile.name / "segmentation"
    parts = [camus.select(table, split) for split in ("training", "validation")]
    downstream.check_apart(*parts)
    real, test = (
        data.load_frames(
            rows, profile.side, keep_aspect=False, cache_dir=assets.workspace() / "cache"
        )
        for rows in parts
    )
    sets = {}
    for seed in range(options.seeds):
        for arm in options.arms:
            name = re.sub(r"[^a-z0-9.]+", "_", arm) + f"-{seed}"
            if (out / f"{name}.json").is_file():
                continue
            asked = {"set": None, "share": 1.0, "augment": True, "recipe": "tuned"} | ARMS[arm]
            frames = real
            if asked["set"]:
                if asked["set"] not in sets:
                    sets[asked["set"]] = sampling.read_frames(
                        options.sets / asked["set"], profile.side
                    )
                drawn, share = sets[asked["set"]], asked["share"]
                frames = (
                    drawn if share is None else downstream.with_synthetic(real, drawn, share, seed)
                )
            steps = options.steps
            if asked.get("match_epochs"):
                steps = round(steps * len(frames) / len(real))
            print(f"{arm}, seed {seed}: {len(frames)} frames, {steps} steps", flush=True)
            run = downstream.segmentation_run(
                frames,
                test,
                profile,
                seed=seed,
                recipe=asked["recipe"],
                steps=steps,
                progress=lambda line: None,
                **({} if asked["augment"] else STILL),
            )
            made = sampling.read_settings(options.sets / asked["set"]) if asked["set"] else None
            results.save(
                out,
                name,
                run | {"arm": arm, "protocol": "paper", "synthetic": made, "asked": asked},
                world=table.attrs["world"],
                profile=profile.name,
                command="python benchmarks/segmentation.py --data /path/to/camus --sets DIR",
                seeds=[seed],
                split="validation",
            )
            print(downstream.summary([run | {"arm": arm}]).T.to_string(), flush=True)


if __name__ == "__main__":
    main()
