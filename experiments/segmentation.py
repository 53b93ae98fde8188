"""Does synthetic data help segmentation? Every arm of chapter 09, seed by seed.

--sets holds the sets `text-seg` and `sdm` that `sample` drew to the label maps of the training patients, 800
images of each class:

    python -m diffecho_utils sample sdm --checkpoint data/checkpoints/camus/sdm --masks ROOT --n 800 --out SETS/sdm

and, for the few patients, `sdm-25`, `sdm-50` and `sdm-100`, 100 images of each class, drawn to the label maps of
these patients by generators that saw them and no others, in the latent space of the phantom's autoencoder:

    python -m diffecho_utils train sdm --data ROOT --patients 25 --latent-channels 16 --views 8 --steps 800 \\
        --ema 0.995 --autoencoder data/checkpoints/phantom/autoencoder --stretch --out GENERATOR
    python -m diffecho_utils sample sdm --checkpoint GENERATOR --masks ROOT --patients 25 --n 100 --out SETS/sdm-25

Each run (an arm with a seed) is scored on the validation patients; chapters 09 and 11 read their zip.
"""

from pathlib import Path

from world import QUIET, kept

from diffecho_utils import data, downstream, synthetic

SEEDS, SPLIT, SETS = [], "validation", ("text-seg", "sdm")
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
PAPER = {"recipe": "paper", "steps": 6000}  # its small network learns slowly; a step costs little
STILL, MATCHED = {"augment": False}, {"match_epochs": True}
ARMS = {"real": {}, "real, not augmented": STILL, "real, paper": PAPER}
ARMS |= {f"{name} alone": {"set": name, "share": None} for name in SETS}
for share in (1.0, 0.5, 2.0):
    ARMS |= {f"real + {share:g} {name}": {"set": name, "share": share} for name in SETS}
for word, change in (("paper", PAPER), ("not augmented", STILL), ("epochs matched", MATCHED)):
    ARMS |= {f"real + 1 {name}, {word}": {"set": name} | change for name in SETS}
for n in (25, 50, 100):
    few = {"patients": n, "steps": 500}
    ARMS[f"{n} patients"] = few
    ARMS[f"{n} patients + sdm"] = few | {"set": f"sdm-{n}", "share": 100 / n}
ARMS["real, long"] = {"steps": 3000}
ARMS["real + 1 text-seg, long"] = {"set": "text-seg", "steps": 3000}
ARMS["real, twice the steps"] = {"steps": 2000}  # the control of the arms with matched epochs


def rows(world, sets=Path("sets"), seeds=5):
    return runs_of(ARMS, sets, seeds, PLAIN)


def runs_of(arms, sets, seeds, plain):
    """{row: settings} of every arm with each seed, the first seed of all arms first."""
    named = {}
    for seed in range(seeds):
        for arm, change in arms.items():
            settings = {"arm": arm, "seed": seed, "asked": plain | change}
            settings["folder"] = sets / change["set"] if "set" in change else None
            named[f"{arm.replace('-', '_')}-{seed}"] = settings
    return named


def compute(world, arm, seed, asked, folder):
    real, test = real_frames(world)
    first = real.table.patient.unique()[: asked["patients"]]
    frames = mine = real.where(real.table.patient.isin(first))
    if folder:
        frames = drawn_frames(folder, world.profile.side)
        if asked["share"]:
            frames = downstream.with_synthetic(mine, frames, asked["share"], seed)
    steps = asked["steps"] or world.profile.segmenter.steps
    if asked["match_epochs"]:
        steps = round(steps * len(frames) / len(mine))
    how = QUIET | ({} if asked["augment"] else data.STILL) | {"recipe": asked["recipe"]}
    run = downstream.segmentation_run(frames, test, world.profile, seed=seed, steps=steps, **how)
    made = folder and synthetic.read_settings(folder)
    return run | {"arm": arm, "synthetic": made, "asked": asked}


@kept
def real_frames(world):
    """Frames of the training and of the validation patients, stretched to a square as the sets are."""
    like = data.Geometry(world.profile.side, stretched=True)
    parts = [data.open_frames(world.table, split, like) for split in ("training", "validation")]
    downstream.check_apart(*(part.table for part in parts))
    return parts


@kept
def drawn_frames(folder, side):
    return synthetic.read_frames(folder, side)
