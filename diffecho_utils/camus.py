"""CAMUS on disk: a folder becomes a table of frames, and a row of the table becomes arrays.

Chapter 01. The layout is the official NIfTI release's (Leclerc et al. 2019):

    ROOT/database_nifti/patientNNNN/patientNNNN_{2CH,4CH}_{ED,ES}[_gt].nii.gz, Info_{2CH,4CH}.cfg
    ROOT/database_split/subgroup_{training,validation,testing}.txt

Every public function works on that layout and on nothing else, so the phantom (`phantom.py`), the
official download and any re-pack of it (`releases.py` converts them) take the same road. What re-packs
change without saying so is undone here: the grey scale, decided once for a whole set, and the
directions of the axes, as each file's affine gives them.
"""

import contextlib
import gzip
import hashlib
import itertools
import json
import logging
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

from diffecho_utils import DiffEchoError, assets, files

nib.imageglobals.logger.setLevel(logging.ERROR)  # it says once a file what `check` says once a set

VIEWS = ("2CH", "4CH")
PHASES = ("ED", "ES")
CLASSES = tuple((view, phase) for view in VIEWS for phase in PHASES)
CLASS_NAMES = tuple(f"{view}-{phase}" for view, phase in CLASSES)
LABELS = {"background": 0, "LV cavity": 1, "myocardium": 2, "LA": 3}
SPLITS = ("training", "validation", "testing")
FOLDS = 10  # of the official cross-validation
PAPER_VALIDATION = 50  # the paper's code validates on the first 50 subjects

COLUMNS = ["patient", "view", "phase", "split", "image", "label_map", "lateral_mm", "depth_mm"]
CFG_COLUMNS = ["quality", "ef", "sex", "age"]
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    zlib.error,
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
    nib.wrapstruct.WrapStructError,
)
_BITS = (10, 12, 14, 15, 16)  # depths of grey values that are more than 8 bits
_FEW = 100  # frames whose grey values are not worth a cache
_OR_CONVERT = (
    ", or convert other forms of CAMUS first: python -m diffecho_utils convert SOURCE DEST"
)


def frame_path(root, patient, view, phase, mask=False):
    """Path of one frame, or of its label map, in the official layout."""
    name = f"{patient}_{view}_{phase}{'_gt' if mask else ''}.nii.gz"
    return Path(root) / "database_nifti" / patient / name


def world(root):
    """Name of the world a folder belongs to, for provenance: what our own `dataset.json` says, else "camus".

    Other tools (nnU-Net) write a file of that name, too; only ours has a `world` in it. Raises
    DiffEchoError for one that is no JSON: it may have been ours.
    """
    path = Path(root) / "dataset.json"
    if not path.is_file():
        return "camus"
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise DiffEchoError(
            f"{path}: no JSON ({error}), so nobody can tell whose frames these are; restore it, or move "
            "it elsewhere if it is another tool's"
        ) from None
    name = found.get("world") if isinstance(found, dict) else None
    return name if isinstance(name, str) else "camus"


def read_table(root):
    """Table of the frames under `root`, one row a frame, in order of patient, view, phase.

    Columns: patient, view ("2CH"/"4CH"), phase ("ED"/"ES"), split ("training"/"validation"/
    "testing", None where no list names the patient), image and label_map (paths), lateral_mm and
    depth_mm (pixel spacing; NaN where the header holds the placeholder 1.0), and from the cfg files
    quality ("Good"/"Medium"/"Poor"), ef (%), sex, age (years): missing where a cfg is silent. What
    `read_frame` needs to know of the whole set goes with every row: transposed (stored as depth,
    lateral), black and white (the file's values of these greys). `table.attrs` holds root and world.

    Raises DiffEchoError listing what is wrong with the files' names, lists, headers and grey scale. The
    arrays are read by `read_frame` and, all at once, by `check`; here only where they are not 8-bit, once.
    """
    table, problems, _ = _scan(root)
    if problems:
        rest = f"; {len(problems) - 5} more" if len(problems) > 5 else ""
        hint = f"(python -m diffecho_utils check {root} looks into every file{rest})"
        raise DiffEchoError("\n".join([*problems[:5], hint]))
    return table


def check(root, progress=None):
    """Everything wrong with the folder `root`: a list of lines "path: problem; remedy", as `examine` finds it."""
    return examine(root, progress)[0]


def examine(root, progress=None):
    """(problems, notes) of the folder `root`: two lists of lines "path: what; remedy or consequence".

    Reads every array: each frame must be 2-D and finite, each label map of the same shape with labels
    0 to 3 that lie as CAMUS's do. What many frames share is one line with their number and the first
    file. Notes are no faults: the set's grey scale, classes, atria and lists that are missing.
    `progress(done, total)` is called after each frame. Never raises for bad data.
    """
    table, problems, notes = _scan(root)
    kinds, sides = {}, {}
    for done, row in enumerate(table.itertuples(), start=1):
        problem, kind, path, side = _look(row)
        if problem:
            problems.append(problem)
        if kind:
            kinds.setdefault(kind, []).append(path)
        if side is not None:
            sides.setdefault((row.patient, row.view), []).append(side)
        if progress:
            progress(done, len(table))
    for kind, paths in kinds.items():
        line = f"{paths[0]}: {kind} (so {len(paths)} of {len(table)} frames)"
        (notes if kind == _NO_ATRIUM else problems).append(line)
    # Twice this sum is the log likelihood that left is left: problems are those of less than e^-9.
    if sum(np.mean(found) for found in sides.values()) < -4.5:
        kind = _ROTATED if table["transposed"].iloc[0] else "left and right exchanged"
        problems.append(
            f"{table['label_map'].iloc[0]}: {kind}, as the chambers of {len(sides)} views lie; {_TURN}"
        )
    return problems, notes


def read_frame(row):
    """One frame as a picture: (image, mask), rows = depth from the probe down, columns = lateral.

    `row` is a row of `read_table` (from `itertuples` or `iloc`). image: (H, W) float32 in 0..255,
    mask: (H, W) uint8 with CAMUS labels. The file's own axis order and directions (lateral, depth in the
    official release; what the affine says; depth, lateral where a tool wrote it transposed) and the
    set's grey scale are undone here and in `read_sequence`.
    Raises DiffEchoError, beginning with the path, for an unreadable or unusable file.
    """
    (image, turns), (mask, mask_turns) = _read_array(row.image), _read_array(row.label_map)
    if image.shape != mask.shape:
        raise DiffEchoError(
            f"{row.label_map}: shape {mask.shape} differs from the frame's {image.shape} in "
            f"{Path(row.image).name}; take both from the same release"
        )
    if (turns is None) != (mask_turns is None) and any(turns or mask_turns):
        raise DiffEchoError(
            f"{row.label_map}: only one of the affines of it and its frame says how the picture lies; "
            "write both with the same affine"
        )
    labels = np.unique(mask)
    unknown = [float(value) for value in labels if value not in LABELS.values()]
    if unknown:
        raise DiffEchoError(
            f"{row.label_map}: labels {unknown[:5]} besides 0-3; a resized label map must be made by "
            "nearest neighbour, and other label sets mapped to CAMUS's 0-3"
        )
    return _picture(scaled(image, row.black, row.white), row), _picture(mask, row).astype(np.uint8)


def read_sequence(row):
    """The half sequence ED..ES beside a row's frame: (T, H, W) float32 in 0..255, pictures as in `read_frame`."""
    path = Path(row.image).with_name(f"{row.patient}_{row.view}_half_sequence.nii.gz")
    array, _ = _read_array(path, dimensions=3)
    return _picture(scaled(array, row.black, row.white), row)


def read_nifti(path, dimensions=2):
    """(array, spacing) of a NIfTI file as its affine lays it: (lateral, depth[, T]), mm a pixel or NaN.

    Raises DiffEchoError, beginning with the path, for what cannot be read and for an impossible spacing.
    """
    lateral, depth, _ = _read_header(path)
    if not _possible(lateral, depth):
        raise DiffEchoError(f"{path}: pixel size {lateral:g} x {depth:g} mm; {_SIZE_REMEDY}")
    unknown = (lateral, depth) == (1, 1)
    return _read_array(path, dimensions)[0], (np.nan, np.nan) if unknown else (lateral, depth)


def grey_levels(ranges):
    """(black, white): the values that mean black and white in a set, told from all of its frames at once.

    ranges: {path of a frame: `grey_range` of it}. 0 to 255, 0 to 1 and -1 to 1 may be overshot a little,
    as interpolation does; whole numbers beyond are taken for 10 to 16 bits. Raises DiffEchoError naming a
    file where the values are none of these, or where the frames are not all on one scale.
    """
    told = {path: r for path, r in ranges.items() if r[1] < r[2]}  # one value alone tells nothing
    if not told:
        raise DiffEchoError(
            f"{next(iter(ranges))}: one grey value all over, as in every frame of the set; export them again"
        )
    whole = all(r[0] for r in told.values())
    lowest, highest = min(told, key=lambda p: told[p][1]), max(told, key=lambda p: told[p][2])
    low, high = told[lowest][1], told[highest][2]
    top = min((2**bits - 1 for bits in _BITS if high < 2**bits), default=0)
    if not whole and low >= -0.1 and 0.5 <= high <= 1.1:
        black, white = 0, 1
    elif not whole and -1.2 <= low <= -0.8 and 0.5 <= high <= 1.2:
        black, white = -1, 1
    elif low >= -25 and 128 <= high <= 280:
        black, white = 0, 255
    elif whole and 280 < high <= top and low >= -0.02 * top:
        black, white = 0, top
    else:
        raise DiffEchoError(
            f"{lowest if low < 0 else highest}: grey values {low:.4g} to {high:.4g} in the set, which are "
            "neither 0 to 255, 0 to 1, -1 to 1 nor 10 to 16 bits (standardised? cut off?); write the "
            "frames anew, 0 for black and 255 for white"
        )
    for path, (_, least, most) in told.items():
        share = [(value - black) / (white - black) for value in (least, most)]
        if share[1] < 0.1 or share[0] > 0.4 or most <= 255 < white:
            raise DiffEchoError(
                f"{path}: grey values {least:.4g} to {most:.4g}, in a set of {low:.4g} to {high:.4g}: "
                "frames on more than one scale; write all on one, 0 for black and 255 for white"
            )
    return black, white


def grey_range(array):
    """What `grey_levels` needs of a frame: (whole numbers only, lowest, highest)."""
    if array.dtype == np.uint8 and array.max() > 1:
        return True, 0.0, 255.0  # known without looking, however dark
    whole = array.dtype.kind in "ui" or bool((array == np.rint(array)).all())
    return whole, float(array.min()), float(array.max())


def scaled(array, black, white):
    """The array with `black` at 0 and `white` at 255, cut off there: float32."""
    if array.dtype == np.uint8 and (black, white) == (0, 255):
        return array.astype(np.float32)
    greys = (array.astype(np.float32) - black) * np.float32(255 / (white - black))
    return greys.clip(0, 255)


def select(table, split=None, view=None, phase=None, patients=None):
    """Rows of the table with this split, view and phase, of the first `patients` patients; never empty.

    `split` "all" (or None) takes every patient, in a list or not. Raises DiffEchoError that says what the
    table has instead.
    """
    keep = pd.Series(True, index=table.index)
    split = None if split == "all" else split
    for column, value in (("split", split), ("view", view), ("phase", phase)):
        if value is not None:
            keep &= table[column] == value
    rows = table[keep]
    if patients is not None:
        rows = rows[rows.patient.isin(rows.patient.unique()[:patients])]
    if rows.empty:
        root, splits = table.attrs.get("root"), table["split"].fillna("none")
        counts = table["patient"].groupby(splits).nunique().to_dict()
        raise DiffEchoError(
            f"{root}: no frame with split={split}, view={view}, phase={phase}; patients in each split: "
            f"{counts}; ask for what is there, for split all (--split all: every patient), or list "
            f"patients, one a line, in {_split_path(Path(str(root)), split or 'training')}"
        )
    return rows.reset_index(drop=True)


def read_folds(table):
    """The table with a column `fold`, 1 to 10, from the release's cross-validation lists.

    They are `subgroupN_testing.txt`, N = 1..10, in a folder below the table's root: fold N is what the
    N-th run is tested on. Raises DiffEchoError where one is missing or not each patient is in exactly one.
    """
    root = Path(table.attrs["root"])
    files = {path.name.lower(): path for path in root.glob("*/*.txt")}
    folds = {}
    for fold in range(1, FOLDS + 1):
        name = f"subgroup{fold}_testing.txt"
        if name not in files:
            raise DiffEchoError(
                f"{root}: no {name} in its folders; add the release's lists, or use camus.make_folds"
            )
        for patient in files[name].read_text().split():
            if patient in folds:
                raise DiffEchoError(
                    f"{files[name]}: {patient} is in fold {folds[patient]} too; restore it"
                )
            folds[patient] = fold
    unlisted = sorted(set(table["patient"]) - set(folds))
    if unlisted:
        raise DiffEchoError(
            f"{root}: {len(unlisted)} patients in no fold, {unlisted[0]} the first; restore the lists, or "
            "use camus.make_folds"
        )
    return table.assign(fold=table["patient"].map(folds))


def make_folds(table, k=FOLDS, seed=0, ef=None):
    """The table with a column `fold`, 1 to `k`: patients dealt evenly over ejection fractions and qualities.

    Patients are sorted by quality (the worse of their views) and EF, and each run of `k` of them is
    dealt to the `k` folds in random order: folds differ by at most one patient, and every fold sees
    every part of the range, however rare. `ef`: (%) by patient, e.g. from `anatomy`, where the cfg
    files are silent; patients without any are sorted last. Raises DiffEchoError for fewer than `k` patients.
    """
    worst = ("quality", "max")  # "Good", "Medium" and "Poor" are in alphabetical order
    patients = table.groupby("patient").agg(quality=worst, ef=("ef", "first"))
    if not 2 <= k <= len(patients):
        raise DiffEchoError(
            f"{table.attrs.get('root')}: {k} folds of {len(patients)} patients; ask for 2 to {len(patients)}"
        )
    if ef is not None:
        patients["ef"] = patients["ef"].fillna(ef)
    rng = np.random.default_rng(seed)
    patients["tie"] = rng.permutation(len(patients))
    dealt = patients.sort_values(["quality", "ef", "tie"]).index
    order = np.concatenate([rng.permutation(k) for _ in range(0, len(dealt), k)])[: len(dealt)]
    return table.assign(fold=table["patient"].map(dict(zip(dealt, order + 1, strict=True))))


def split_by_fold(table, testing):
    """The table with `split` from its column `fold`: this fold for testing, the next for validation.

    `testing` = 5 on the official folds is the official 400/50/50.
    """
    k = int(table["fold"].max())
    if testing not in range(1, k + 1):
        raise DiffEchoError(f"{table.attrs.get('root')}: no fold {testing}; ask for 1 to {k}")
    names = {testing: "testing", testing % k + 1: "validation"}
    return table.assign(split=table["fold"].map(names).fillna("training"))


def split_as_paper(table, validation=PAPER_VALIDATION):
    """The table with `split` as in the paper's code: the first `validation` patients, the rest for training."""
    patients = table["patient"].unique()
    if not 0 < validation < len(patients):
        raise DiffEchoError(
            f"{table.attrs.get('root')}: {validation} of {len(patients)} patients for validation leave "
            f"none on one side; ask for 1 to {len(patients) - 1}"
        )
    first = table["patient"].isin(patients[:validation])
    return table.assign(split=first.map({True: "validation", False: "training"}))


def class_index(table):
    """Index of each row's class in `CLASSES`: (N,) int64."""
    pairs = zip(table["view"], table["phase"], strict=True)
    return np.array([CLASSES.index(pair) for pair in pairs], dtype=np.int64)


# --- scanning -------------------------------------------------------------------------------------

_SIZE_REMEDY = "write the right one (CAMUS's is 0.308), or 1 where it is unknown"


def _scan(root):
    """(table, problems, notes) from names, lists, cfg files, headers and the set's grey scale."""
    root = Path(root)
    try:
        whose, patients_dir = world(root), _patients_dir(root)
    except DiffEchoError as error:
        return pd.DataFrame(), [str(error)], []
    splits, problems = _read_splits(root)
    rows = []
    for folder in sorted(p for p in patients_dir.iterdir() if p.is_dir() and _is_patient(p)):
        for view in VIEWS:
            try:
                info = _read_cfg(folder / f"Info_{view}.cfg")
            except DiffEchoError as error:
                problems.append(str(error))
                info = {}
            for phase in PHASES:
                try:
                    files = _read_pair(root, folder.name, view, phase)
                except DiffEchoError as error:
                    problems.append(str(error))
                    continue
                if files:
                    key = dict(patient=folder.name, view=view, phase=phase)
                    rows.append(key | dict(split=splits.get(folder.name)) | files | info)
    if not rows and not problems:
        problems.append(
            f"{patients_dir}: no patientNNNN_{{2CH,4CH}}_{{ED,ES}}.nii.gz in its folders; copy them"
            f"{_OR_CONVERT}"
        )
    present = {row["patient"] for row in rows}
    for split in SPLITS if rows else ():
        listed = {patient for patient, name in splits.items() if name == split}
        if listed and not listed & present:
            problems.append(
                f"{_split_path(root, split)}: none of its patients is in database_nifti; restore it"
            )
    table = pd.DataFrame(rows, columns=[*COLUMNS, *CFG_COLUMNS, "eight_bit"])
    table.attrs = {"root": str(root), "world": whose}
    notes = _set_facts(table, problems) if rows else []
    return table.drop(columns="eight_bit"), problems, notes


def _set_facts(table, problems):
    """Fill in what is decided for the set: spacing, transposed, black, white. Returns notes on it."""
    root, spacing = table.attrs["root"], ["lateral_mm", "depth_mm"]
    sizes = table[spacing].to_numpy(dtype=float, copy=True)
    odd = np.flatnonzero([not _possible(*size) for size in sizes])
    if len(odd):
        lateral, depth = sizes[odd[0]]
        problems.append(
            f"{table['image'].iloc[odd[0]]}: pixel size {lateral:g} x {depth:g} mm, impossible in "
            f"{len(odd)} of {len(table)} frames; {_SIZE_REMEDY}"
        )
    sizes[[*odd, *np.flatnonzero((sizes == 1).all(1))]] = np.nan
    transposed = _is_transposed(table)
    table[spacing] = sizes[:, ::-1] if transposed else sizes
    black, white, told = 0, 255, "8-bit frames"
    if not table["eight_bit"].all():
        try:
            ranges = _grey_ranges(table)
            if ranges:
                black, white = grey_levels(ranges)
                low, high = min(r[1] for r in ranges.values()), max(r[2] for r in ranges.values())
                told = f"values from {low:.4g} to {high:.4g}"
        except DiffEchoError as error:
            problems.append(str(error))
    table["transposed"], table["black"], table["white"] = transposed, black, white
    notes = [f"{root}: grey scale: {told}; {black:g} is read as black, {white:g} as white"]
    if transposed:
        notes.append(f"{root}: stored as (depth, lateral), by the places of the chambers; read so")
    there = set(zip(table["view"], table["phase"], strict=True))
    lacking = [name for name, key in zip(CLASS_NAMES, CLASSES, strict=True) if key not in there]
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


def _grey_ranges(table):
    """{path: `grey_range`} of the readable frames, for `grey_levels`.

    Those that are not 8-bit are read, once: many of them are kept in the workspace's cache.
    """
    eight_bit = table["eight_bit"].astype(bool)
    others = table["image"][~eight_bit].tolist()
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in others]
    digest = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16]
    cache = assets.workspace() / "cache" / f"greys-{digest}.json" if len(others) >= _FEW else None
    found = None
    if cache:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(cache.read_text())
    if found is None:
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(_file_range, others))
        if cache and None not in found:
            cache.parent.mkdir(exist_ok=True)
            files.write_text(cache, json.dumps(found))
    known = dict.fromkeys(table["image"][eight_bit], (True, 0.0, 255.0))
    return known | {path: r for path, r in zip(others, found, strict=True) if r}


def _file_range(path):
    try:
        return grey_range(_read_array(path)[0])
    except DiffEchoError:
        return None  # `check` and `read_frame` report it


def _read_pair(root, patient, view, phase):
    """Paths and facts of a frame and its label map; None where a re-pack has neither."""
    image, mask = (frame_path(root, patient, view, phase, mask) for mask in (False, True))
    missing = [path for path in (image, mask) if not path.exists()]
    for path in missing:
        if path.with_suffix("").exists():
            raise DiffEchoError(f"{path.with_suffix('')}: uncompressed; gzip it{_OR_CONVERT}")
    if len(missing) == 2:
        return None
    for path, kind in ((image, "frame"), (mask, "label map")):
        if path in missing:
            partner = (mask if kind == "frame" else image).name
            raise DiffEchoError(f"{path}: {kind} missing beside {partner}; copy it, or remove both")
    lateral, depth, eight_bit = _read_header(image)
    files = dict(image=image, label_map=mask)
    return files | dict(lateral_mm=lateral, depth_mm=depth, eight_bit=eight_bit)


def _patients_dir(root):
    """ROOT/database_nifti; DiffEchoError says what is wrong with ROOT and which folder to pass."""
    expected = "the folder that holds database_nifti/"
    if not root.is_dir():
        raise DiffEchoError(f"{root}: no such folder; pass {expected}{_OR_CONVERT}")
    folder = root / "database_nifti"
    if folder.is_dir():
        if any(p.is_dir() and _is_patient(p) for p in folder.iterdir()):
            return folder
        raise DiffEchoError(
            f"{folder}: no patientNNNN folder in it; was the archive unpacked wholly?"
        )
    where = root.resolve()
    if _is_patient(root) and where.parent.name == "database_nifti":
        raise DiffEchoError(f"{root}: two levels too low; pass {where.parents[1]}, {expected}")
    if where.name == "database_nifti":
        raise DiffEchoError(f"{root}: one level too low; pass {where.parent}, {expected}")
    below = sorted(root.glob("*/database_nifti"))
    if below:
        raise DiffEchoError(f"{root}: one level too high; pass {below[0].parent}, {expected}")
    raise DiffEchoError(f"{root}: no database_nifti/ in it; pass {expected}{_OR_CONVERT}")


def _is_patient(path):
    return re.fullmatch(r"patient\d+", path.name) is not None


def _split_path(root, split):
    return root / "database_split" / f"subgroup_{split}.txt"


def _read_splits(root):
    """({patient: split}, problems) from the official lists; having no lists is not a problem."""
    splits, problems = {}, []
    for split in SPLITS:
        path = _split_path(root, split)
        if not path.exists():
            continue
        try:
            patients = path.read_text().split()
        except UnicodeDecodeError:
            problems.append(f"{path}: no plain text; write it anew, in UTF-8, one patient a line")
            continue
        if not patients:
            problems.append(
                f"{path}: empty list; restore it, or delete it to go without this split"
            )
        for patient in patients:
            other = splits.setdefault(patient, split)
            if other != split:
                problems.append(f"{path}: {patient} is in {other} too; a patient has one split")
    return splits, problems


def _read_cfg(path):
    """Quality, EF, sex and age from an Info_*.cfg (new or older keys); {} where there is no file."""
    if not path.exists():
        return {}
    try:
        pairs = [line.split(":", 1) for line in path.read_text().splitlines() if line.strip()]
        cfg = {key.strip(): value.strip() for key, value in pairs}
        number = {k: float(cfg[k]) for k in ("EF", "LVef", "Age") if cfg.get(k, "NA") != "NA"}
    except (UnicodeDecodeError, ValueError) as error:
        raise DiffEchoError(
            f"{path}: not a cfg of `key: value` lines ({error}); restore it from the release, or "
            "delete it to go without quality and EF"
        ) from None
    return {
        "quality": cfg.get("ImageQuality"),
        "ef": number.get("EF", number.get("LVef")),
        "sex": cfg.get("Sex"),
        "age": number.get("Age"),
    }


# --- files ----------------------------------------------------------------------------------------


def _read_header(path):
    """(mm along the first axis, along the second, whether 8-bit as it is), the axes as the affine lays them.

    A tenth of nibabel.load's time, which thousands of files feel.
    """
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
            header = nib.Nifti1Header(file.read(348), check=False)
        if header["sizeof_hdr"] != 348:
            raise OSError("no NIfTI header")
        eight_bit, turns = header.get_data_dtype() == np.uint8, _turns(header)
        sizes = zip(header.get_zooms(), header.get_data_shape(), strict=True)
    except _UNREADABLE as error:
        raise DiffEchoError(f"{path}: unreadable ({error}); copy or download it again") from None
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    eight_bit &= slope == 0 or np.isnan(slope) or (slope == 1 and inter == 0)
    spacing = [float(zoom) for zoom, n in sizes if n > 1][:2]
    if len(spacing) < 2:  # no picture; reading the array says so
        spacing = [1.0, 1.0]
    return *(spacing[::-1] if turns and turns[0] else spacing), bool(eight_bit)


def _possible(lateral, depth):
    """Whether both are pixel sizes in mm that an echocardiogram can have (1 is the usual placeholder)."""
    return 0.01 <= lateral <= 10 and 0.01 <= depth <= 10


def _turns(header):
    """What a header's affine says of a plane: (axes exchanged, first flipped, second flipped), or None.

    CAMUS's own is diag(-s, -s, 1). A positive diagonal without a translation is a placeholder, as is no
    affine at all: None. (nibabel's as_closest_canonical turns the array, and leaves a translation.)
    """
    if not (header["sform_code"] or header["qform_code"]) or min(header.get_data_shape()[:2]) < 2:
        return None
    affine = header.get_best_affine()
    plane, origin = affine[:2, :2], affine[:2, 3]
    exchanged = abs(plane[0, 1] * plane[1, 0]) > abs(plane[0, 0] * plane[1, 1])
    steps = plane[[1, 0], [0, 1]] if exchanged else np.diag(plane)
    if not steps.all() or not np.isfinite(steps).all() or ((steps > 0).all() and not origin.any()):
        return None
    return bool(exchanged), *(bool(step > 0) for step in steps)


def _read_array(path, dimensions=2):
    """(the file's array as its affine lays it, `_turns`): finite, of the expected number of dimensions."""
    try:
        image = nib.load(path)
    except _UNREADABLE as error:
        raise DiffEchoError(f"{path}: unreadable ({error}); copy or download it again") from None
    try:
        array = np.asanyarray(image.dataobj)
        turns = _turns(image.header)
    except _UNREADABLE as error:
        raise DiffEchoError(f"{path}: truncated ({error}); copy or download it again") from None
    array = array.reshape([n for n in array.shape if n > 1])  # (H, W, 1) is a 2-D frame too
    if array.ndim != dimensions:
        kind = "a half sequence where a single frame is expected" if array.ndim == 3 else "no image"
        raise DiffEchoError(f"{path}: shape {array.shape}, {kind}; restore the file of this name")
    if array.dtype.kind not in "uif":
        raise DiffEchoError(f"{path}: colours or complex numbers; write one grey value a pixel")
    if not np.isfinite(array).all():
        raise DiffEchoError(f"{path}: holds NaN or infinite values; copy or download it again")
    if turns:
        array = np.flip(array, [axis for axis in (0, 1) if turns[1 + axis]])
        array = array.swapaxes(0, 1) if turns[0] else array
    return array, turns


def _picture(array, row):
    """(H, W) or (T, H, W) of an array (lateral, depth[, T]) as a row's set stores it."""
    return (array.swapaxes(0, 1) if row.transposed else array).T


# --- anatomy --------------------------------------------------------------------------------------

_AGAIN = "take frame and label map from the release again, or leave the frame out"
_TURN = (
    "turn frames and label maps (apex up, in 4CH the left heart on the right), or write the affine that "
    "says how they lie"
)
_ROTATED = "rotated by 90 degrees"  # what is both transposed and mirrored or upside down
_NO_ATRIUM = "no LA (label 3); nothing is known of the atrium's size there, all else works"


def _look(row):
    """(problem, kind of fault, the file that has it, evidence that left is left) of one frame, or None."""
    try:
        image, mask = read_frame(row)
    except DiffEchoError as error:
        return str(error), None, None, None
    if image.max() <= 1 or image.max() == image.min():
        return None, f"black, or of one grey value; {_AGAIN}", row.image, None
    step = max(1, round(max(mask.shape) / 128))
    small = mask[::step, ::step].astype(np.intp)
    kind = _fault(small, row.transposed)
    if kind:
        return None, kind, row.label_map, None
    lit = np.flatnonzero((image > 8).mean(0) > 0.02) / step
    middle = (lit[0] + lit[-1]) / 2 if len(lit) else small.shape[1] / 2
    return None, None, None, _left_is_left(small, row.view, middle)


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
    order = _order(mask, present[LABELS["LA"]])
    if order != (1, 2, 3):
        found = ", ".join(f"{name} {n}" for name, n in zip(list(LABELS)[1:], order, strict=True))
        return f"labels exchanged ({found} by their places); map them to CAMUS's 1, 2, 3"
    (row, column), (wall, _), (low, side) = (_centre(mask == label) for label in (1, 2, 3))
    atrium = present[LABELS["LA"]]
    if atrium and abs(side - column) > abs(low - row):
        return f"{_ROTATED}; {_TURN}"
    if low < row if atrium else wall - row > 0.03 * len(mask):
        return f"{_ROTATED if transposed else 'upside down'}; {_TURN}"
    return None if atrium else _NO_ATRIUM


def _order(mask, atrium=True):
    """The labels that lie as cavity, myocardium and atrium do: the wall around the first, not the last."""
    pairs = np.bincount((4 * mask[1:] + mask[:-1]).ravel(), minlength=16)
    pairs += np.bincount((4 * mask[:, 1:] + mask[:, :-1]).ravel(), minlength=16)
    border = pairs.reshape(4, 4) + pairs.reshape(4, 4).T
    np.fill_diagonal(border, 0)
    share = border / np.maximum(border.sum(1, keepdims=True), 1)  # of a label's whole border
    orders = itertools.permutations((1, 2, 3)) if atrium else [(1, 2, 3), (2, 1, 3)]
    return max(orders, key=lambda o: share[o[0], o[1]] - share[o[2], o[1]])


def _left_is_left(mask, view, middle):
    """Log likelihood (halved) that a label map is not mirrored, from where its chambers lie; see `examine`.

    Linear discriminants of CAMUS's 450 public patients. In 2CH the atrium lies to the right of the cavity
    and the wall to the left; in 4CH the cavity to the right of the sector's `middle`. Of single views 8 %
    and 14 % lie otherwise: only a set can be told.
    """
    cavity, wall, atrium = (_centre(mask == label)[1] / mask.shape[1] for label in (1, 2, 3))
    if view == "2CH":
        return 19.3 * (atrium - cavity) - 66.7 * (wall - cavity)
    return 37.1 * (cavity - middle / mask.shape[1])


def _centre(region):
    """Mean (row, column) of the pixels where `region` is true; NaN of none."""
    rows, columns = np.nonzero(region)
    return (rows.mean(), columns.mean()) if len(rows) else (np.nan, np.nan)


def _is_transposed(table, frames=8):
    """Whether the folder's arrays are (depth, lateral) instead of CAMUS's (lateral, depth).

    The atrium lies deeper than the ventricle in every apical view, and the ventricle deeper than the
    middle of its wall, so these lines run along the depth axis; a few label maps vote.
    """
    votes = []
    for path in table["label_map"].iloc[:: max(1, len(table) // frames)]:
        try:
            mask, _ = _read_array(path)
        except DiffEchoError:
            continue  # `check` and `read_frame` report it
        other = "LA" if (mask == LABELS["LA"]).any() else "myocardium"
        line = np.subtract(*(_centre(mask == LABELS[name]) for name in ("LV cavity", other)))
        if np.isfinite(line).all():
            votes.append(abs(line[0]) > abs(line[1]))
    return bool(votes) and np.mean(votes) > 0.5
