"""Does synthetic data help segmentation? Every arm of chapter 09, seed by seed, on CAMUS.

    python benchmarks/segmentation.py --data ROOT --sets DIR [--arms NAME ...] [--seeds N]
    python benchmarks/segmentation.py --pack

DIR holds the sets `text-seg` and `sdm` that `sample` drew to the label maps of the training patients, 800
images of each class:

    python -m diffecho_utils sample sdm --checkpoint data/checkpoints/camus/sdm --masks ROOT --n 800 --out DIR/sdm

and, for the few patients, `sdm-25`, `sdm-50` and `sdm-100`, 100 images of each class, drawn to the label maps of
these patients by generators that saw them and no others, in the latent space of the phantom's autoencoder:

    python -m diffecho_utils train sdm --data ROOT --patients 25 --latent-channels 16 --views 8 --steps 800 \\
        --ema 0.995 --autoencoder data/checkpoints/phantom/autoencoder --stretch --out GENERATOR
    python -m diffecho_utils sample sdm --checkpoint GENERATOR --masks ROOT --patients 25 --n 100 --out DIR/sdm-25

Each run (an arm with a seed) is scored on the validation patients and becomes one file in --out; runs whose
file is there are left out, so the command can be stopped at any moment, repeated, and run twice side by side
with other arms. Without --arms all of them, the first seed of each first. --pack puts the runs that are
there into data/results/camus/cpu/segmentation.zip, which chapters 09 and 11 read.
"""

import argparse
import re
from pathlib import Path

from diffecho_utils import (
    assets,
    camus,
    data,
    downstream,
    profiles,
    results,
    runs,
    synthetic,
)

SETS = ("text-seg", "sdm")
PLAIN = {
    "set": None,
    "share": 1.0,  # synthetic frames for a real one; None: no real ones
    "patients": None,  # real frames of the first so many training patients; None: all
    "augment": True,
    "recipe": "tuned",
    "match_epochs": False,
    "steps": None,  # of the optimiser; None: the profile's
}
# Arm: what differs from "real", which has classical augmentation and the tuned recipe.
PAPER = {
    "recipe": "paper",
    "steps": 6000,
}  # its small network learns slowly, and a step costs little
ARMS = {"real": {}, "real, not augmented": {"augment": False}, "real, paper": PAPER}
ARMS |= {f"{name} alone": {"set": name, "share": None} for name in SETS}
for share in (1.0, 0.5, 2.0):
    ARMS |= {f"real + {share:g} {name}": {"set": name, "share": share} for name in SETS}
for word, change in {
    "paper": PAPER,
    "not augmented": {"augment": False},
    "epochs matched": {"match_epochs": True},
}.items():
    ARMS |= {f"real + 1 {name}, {word}": {"set": name} | change for name in SETS}
for n in (25, 50, 100):
    few = {"patients": n, "steps": 500}
    ARMS |= {f"{n} patients": few}
    ARMS |= {f"{n} patients + sdm": few | {"set": f"sdm-{n}", "share": 100 / n}}
for name, change in {"real": {}, "real + 1 text-seg": {"set": "text-seg"}}.items():
    ARMS |= {f"{name}, long": change | {"steps": 3000}}
ARMS["real, twice the steps"] = {"steps": 2000}  # the control of the arms with matched epochs


def real_frames(table, profile):
    """Frames of the training and of the validation patients, stretched to a square as the sets are."""
    parts = [camus.select(table, split) for split in ("training", "validation")]
    downstream.check_apart(*parts)
    cache = assets.workspace() / "cache"
    return [
        data.load_frames(rows, data.Geometry(profile.side, True), cache_dir=cache) for rows in parts
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="CAMUS folder")
    parser.add_argument("--sets", type=Path, help="folder of the synthetic sets")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="default: _build/runs/segmentation")
    parser.add_argument(
        "--compiled", action="store_true", help="needs a C++ compiler; a little faster"
    )
    parser.add_argument("--pack", action="store_true", help="only collect the runs that are there")
    options = parser.parse_args()
    out = options.out or assets.workspace() / "runs" / "segmentation"
    if options.pack:
        print("wrote", results.pack(out, assets.root() / "data/results/camus/cpu/segmentation.zip"))
        return
    profile, table = profiles.get("cpu"), camus.read_table(options.data)
    real, test = real_frames(table, profile)
    sets = {}
    for seed in range(options.seeds):
        for arm in options.arms:
            name = re.sub(r"[^a-z0-9.]+", "_", arm) + f"-{seed}"
            if (out / f"{name}.json").is_file():
                continue
            asked = PLAIN | ARMS[arm]
            folder = asked["set"] and options.sets / asked["set"]
            first = real.table.patient.unique()[: asked["patients"]]
            frames = mine = real.where(real.table.patient.isin(first))
            if folder:
                if folder not in sets:
                    sets[folder] = synthetic.read_frames(folder, profile.side)
                frames = sets[folder]
                if asked["share"]:
                    frames = downstream.with_synthetic(mine, frames, asked["share"], seed)
            steps = asked["steps"] or profile.segmentation.steps
            if asked["match_epochs"]:
                steps = round(steps * len(frames) / len(mine))
            print(f"{arm}, seed {seed}: {len(frames)} frames, {steps} steps", flush=True)
            run = downstream.segmentation_run(
                frames,
                test,
                profile,
                seed=seed,
                recipe=asked["recipe"],
                steps=steps,
                progress=lambda line: None,
                compiled=options.compiled and asked["recipe"] == "tuned",
                **({} if asked["augment"] else data.STILL),
            )
            made = synthetic.read_settings(folder) if folder else None
            results.save(
                out,
                name,
                run | {"arm": arm, "synthetic": made, "asked": asked},
                world=table.attrs["world"],
                profile=profile.name,
                command="python benchmarks/segmentation.py --data /path/to/camus --sets DIR",
                seeds=[seed],
                split="validation",
            )
            print(runs.summary([run | {"arm": arm}]).T.to_string(), flush=True)


if __name__ == "__main__":
    main()
