"""Which ingredient of the phantom matters: `phantom_realism` with each left out, twice, and trained longer.

Chapter 01 shows it. An hour on two cores.
"""

import phantom_realism
from phantom_realism import SEEDS, SETTINGS, SPLIT, compute  # noqa: F401


def rows(world, patients=120, settings=tuple(SETTINGS), seeds=2, steps=1500):
    return phantom_realism.rows(world, patients, settings, seeds, steps)


def collect(world, found):
    return {"phantom_ablation": phantom_realism.record(found)}
