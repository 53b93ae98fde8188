"""Does synthetic data help a network that ImageNet has taught? The last table of chapter 10, seed by seed.

EfficientNet-Lite0, whose ImageNet weights come with two packages of the extra `lite0`; nearest to the
paper's EfficientNet-B0 of what needs no torchvision. Trained are its last two million weights, as in the
paper's code, or all of them. --sets and the rest as of `classification`.
"""

from pathlib import Path

from classification import PLAIN, SETS, compute  # noqa: F401
from segmentation import runs_of

from diffecho_utils import backbones

SEEDS, SPLIT = [], "validation"
PLAIN = PLAIN | {"network": backbones.LITE, "side": 96, "pretrained": True}
# Learning rates by accuracy on 80 of the training patients: the best of 3e-4, 1e-3 and, for the last, 3e-3.
PARTS = {"last 2M": {"last": 2_000_000, "learning_rate": 3e-3}, "all": {"learning_rate": 1e-3}}
ARMS = {}
for part, change in PARTS.items():
    ARMS[f"real, {part}"] = change
    ARMS |= {f"real + {name}, {part}": change | {"set": name} for name in SETS}
ARMS["real, from scratch"] = PARTS["all"] | {"pretrained": False}


def rows(world, sets=Path("sets"), seeds=5, steps=0):
    every = runs_of(ARMS, sets, seeds, PLAIN)
    return {row: settings | {"steps": steps} for row, settings in every.items()}
