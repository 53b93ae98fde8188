"""What the command `check` looks at: every array of a folder, whether its hearts lie as CAMUS's do.

Chapter 01. `camus.read_table` reads names, lists and headers; a file may be whole and its picture still
upside down, mirrored, black, or its labels exchanged. All of it is found at once, each with a remedy.
"""

import itertools
from collections import defaultdict

import numpy as np

from diffecho_utils import DiffEchoError, camus
from diffecho_utils.camus import LABELS

_AGAIN = "take frame and label map from the release again, or leave the frame out"
_TURN = (
    "turn frames and label maps (apex up, in 4CH the left heart on the right), or write the affine that "
    "says how they lie"
)
_ROTATED = "rotated by 90 degrees"  # what is both transposed and mirrored or upside down
_NO_ATRIUM = "no LA (label 3); nothing is known of the atrium's size there, all else works"


def check(root, progress=None):
    """Everything wrong with the folder `root`: a list of lines "path: problem; remedy", as `examine` finds it."""
    return examine(root, progress)[0]


def examine(root, progress=None):
    """(problems, notes) of the folder `root`: two lists of lines "path: what; remedy or consequence".

    Reads every array: each frame must be 2-D and finite, each label map of the same shape with labels
    0 to 3 that lie as CAMUS's do. What many frames share is one line with their number and the first
    file. Notes are no faults: the set's grey scale, classes, atria and lists that are missing.
    `progress(done, total, unit)` is called after each frame. Never raises for bad data.
    """
    table, problems = camus.scan(root)
    notes = [] if table.empty else _notes(table)
    faults, sides = defaultdict(list), defaultdict(list)
    for done, row in enumerate(table.itertuples(), start=1):
        try:
            image, mask = camus.read_frame(row)
        except DiffEchoError as error:
            problems.append(str(error))
        else:
            if image.max() <= 1 or image.max() == image.min():
                faults[f"black, or of one grey value; {_AGAIN}"].append(row.image)
            elif fault := _fault(_small(mask)[0], row.transposed):
                faults[fault].append(row.label_map)
            else:
                sides[row.patient, row.view].append(_left_is_left(image, mask, row.view))
        if progress:
            progress(done, len(table), "frames")
    for fault, paths in faults.items():
        line = f"{paths[0]}: {fault} (so {len(paths)} of {len(table)} frames)"
        (notes if fault == _NO_ATRIUM else problems).append(line)
    # Twice this sum is the log likelihood that left is left: problems are those of less than e^-9.
    if sum(np.mean(found) for found in sides.values()) < -4.5:
        fault = _ROTATED if table["transposed"].iloc[0] else "left and right exchanged"
        first = table["label_map"].iloc[0]
        problems.append(f"{first}: {fault}, as the chambers of {len(sides)} views lie; {_TURN}")
    return problems, notes


def _notes(table):
    """What a user should know of the set as a whole."""
    root, greys, row = table.attrs["root"], table.attrs["greys"], table.iloc[0]
    scale = f"{row.black:g} is read as black, {row.white:g} as white"
    notes = [f"{root}: grey scale: {greys}; {scale}"]
    if row.transposed:
        notes.append(f"{root}: stored as (depth, lateral), by the places of the chambers; read so")
    there = set(camus.class_index(table))
    lacking = [name for index, name in enumerate(camus.CLASS_NAMES) if index not in there]
    if lacking:
        notes.append(
            f"{root}: no frame of {', '.join(lacking)}; prompts and the training of generators and "
            "segmenters work without, but ejection fractions and the commands evaluate and downstream "
            "classification need all four classes"
        )
    unlisted = table[table["split"].isna()]["patient"].nunique()
    if unlisted:
        notes.append(
            f"{root}: {unlisted} patients in no list; use them with --split all, or list them in "
            "database_split/subgroup_{training,validation,testing}.txt, one a line"
        )
    return notes


def _small(mask):
    """(every n-th pixel of a label map, int, about 128 along its longer side; n)."""
    step = max(1, round(max(mask.shape) / 128))
    return mask[::step, ::step].astype(np.intp), step


def _fault(mask, transposed):
    """What a label map (H, W) has that CAMUS's never have, with the remedy; None where nothing.

    All of CAMUS's 1,800 public frames pass with room: the atrium lies deeper than the cavity by a fifth
    of the picture or more, and the labels' order wins by far.
    """
    present = np.bincount(mask.ravel(), minlength=4) > 0
    if not present[1:].any():
        return f"empty label map; {_AGAIN}"
    for name in ("LV cavity", "myocardium"):
        if not present[LABELS[name]]:
            return f"label map without {name} (label {LABELS[name]}); {_AGAIN}"
    atrium = present[LABELS["LA"]]
    order = _order(mask, atrium)
    if order != (1, 2, 3):
        found = ", ".join(f"{name} {n}" for name, n in zip(list(LABELS)[1:], order, strict=True))
        return f"labels exchanged ({found} by their places); map them to CAMUS's 1, 2, 3"
    (row, column), (wall, _), (low, side) = (camus.centre(mask == label) for label in (1, 2, 3))
    if atrium and abs(side - column) > abs(low - row):
        return f"{_ROTATED}; {_TURN}"
    if low < row if atrium else wall - row > 0.03 * len(mask):
        return f"{_ROTATED if transposed else 'upside down'}; {_TURN}"
    return None if atrium else _NO_ATRIUM


def _order(mask, atrium):
    """The labels that lie as cavity, myocardium and atrium do: the wall around the first, not the last."""
    pairs = np.zeros(16, int)  # at 4 a + b: pixels of label a below, or right of, one of label b
    for some, others in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
        pairs += np.bincount((4 * some + others).ravel(), minlength=16)
    border = pairs.reshape(4, 4) + pairs.reshape(4, 4).T
    np.fill_diagonal(border, 0)
    share = border / np.maximum(border.sum(1, keepdims=True), 1)  # of a label's whole border
    orders = itertools.permutations((1, 2, 3)) if atrium else [(1, 2, 3), (2, 1, 3)]

    def wall_is_between(order):
        cavity, wall, last = order
        return share[cavity, wall] - share[last, wall]

    return max(orders, key=wall_is_between)


def _left_is_left(image, mask, view):
    """Log likelihood (halved) that a frame is not mirrored, from where its chambers lie; see `examine`.

    Linear discriminants of CAMUS's 450 public patients. In 2CH the atrium lies to the right of the cavity
    and the wall to the left; in 4CH the cavity to the right of the middle of the sector. Of single views
    8 % and 14 % lie otherwise: only a set can be told.
    """
    small, step = _small(mask)
    width = small.shape[1]
    cavity, wall, atrium = (camus.centre(small == label)[1] / width for label in (1, 2, 3))
    if view == "2CH":
        return 19.3 * (atrium - cavity) - 66.7 * (wall - cavity)
    lit = np.flatnonzero((image > 8).mean(0) > 0.02) / step  # columns of the sector
    middle = (lit[0] + lit[-1]) / 2 if len(lit) else width / 2
    return 37.1 * (cavity - middle / width)
