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
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from diffecho_utils import DiffEchoError, assets, files

nib.imageglobals.logger.setLevel(logging.ERROR)  # it says once a file what `check` says once a set

VIEWS = ("2CH", "4CH")
PHASES = ("ED", "ES")
CLASSES = tuple((view, phase) for view in VIEWS for phase in PHASES)
CLASS_NAMES = tuple(f"{view}-{phase}" for view, phase in CLASSES)
LABELS = {"background": 0, "LV cavity": 1, "myocardium": 2, "LA": 3}
SPLITS = ("training", "validation", "testing")
FOLDS = 10  # of the official cross-validation

_COLUMNS = "patient view phase split image label_map lateral_mm depth_mm quality ef sex age".split()
_UNREADABLE = (OSError, EOFError, ValueError, KeyError, zlib.error)
_UNREADABLE += (ImageFileError, HeaderDataError, WrapStructError)
_BITS = (10, 12, 14, 15, 16)  # depths of grey values that are more than 8 bits
_FEW = 100  # frames whose grey values are not worth a cache
_CONVERT = "or convert other forms of CAMUS first: python -m diffecho_utils convert SOURCE DEST"


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
    arrays are read by `read_frame` and, all at once, by `checks`; here only where they are not 8-bit, once.
    """
    table, problems = scan(root)
    if problems:
        rest = f"; {len(problems) - 5} more" if len(problems) > 5 else ""
        hint = f"(python -m diffecho_utils check {root} looks into every file{rest})"
        raise DiffEchoError("\n".join([*problems[:5], hint]))
    return table


def scan(root):
    """(table, problems): what `read_table` returns, or would refuse: lines "path: problem; remedy".

    The table's attrs also hold `greys`, in words: what the set's scale was told from.
    """
    root = Path(root)
    try:
        whose, patients_dir = world(root), _patients_dir(root)
    except DiffEchoError as error:
        return pd.DataFrame(), [str(error)]
    lists = {split: _list_path(root, split) for split in SPLITS}
    splits, problems = _read_lists(lists)
    rows = []
    for folder, view in itertools.product(_patients(patients_dir), VIEWS):
        info = {}
        with _noted(problems):
            info = _read_cfg(folder / f"Info_{view}.cfg")
        for phase in PHASES:
            with _noted(problems):
                if found := _read_pair(root, folder.name, view, phase):
                    key = dict(patient=folder.name, view=view, phase=phase)
                    rows.append(key | dict(split=splits.get(folder.name)) | found | info)
    if not rows and not problems:
        problems.append(
            f"{patients_dir}: no patientNNNN_{{2CH,4CH}}_{{ED,ES}}.nii.gz in its folders; copy them, "
            f"{_CONVERT}"
        )
    absent = set(splits.values()) - {row["split"] for row in rows} if rows else ()
    for split in sorted(absent):
        problems.append(f"{lists[split]}: none of its patients is in database_nifti; restore it")
    table = pd.DataFrame(rows, columns=[*_COLUMNS, "eight_bit"])
    table.attrs = {"root": str(root), "world": whose}
    if rows:
        _decide_for_the_set(table, problems)
    return table.drop(columns="eight_bit"), problems


def read_frame(row):
    """One frame as a picture: (image, mask), rows = depth from the probe down, columns = lateral.

    `row` is a row of `read_table` (from `itertuples` or `iloc`). image: (H, W) float32 in 0..255,
    mask: (H, W) uint8 with CAMUS labels. The file's own axis order and directions (lateral, depth in the
    official release; what the affine says; depth, lateral where a tool wrote it transposed) and the
    set's grey scale are undone here.
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
    unknown = [float(value) for value in np.unique(mask) if value not in LABELS.values()]
    if unknown:
        raise DiffEchoError(
            f"{row.label_map}: labels {unknown[:5]} besides 0-3; a resized label map must be made by "
            "nearest neighbour, and other label sets mapped to CAMUS's 0-3"
        )
    image, mask = scaled(image, row.black, row.white), mask.astype(np.uint8)
    return (image, mask) if row.transposed else (image.T, mask.T)


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
            f"patients, one a line, in {_list_path(Path(str(root)), split or 'training')}"
        )
    return rows.reset_index(drop=True)


def by_fold(table, fold, seed=0):
    """The table with `split` set for one of the ten folds (1 to 10) of a cross-validation.

    The release's lists say it, `subgroupN_{training,validation,testing}.txt` in a folder below the root.
    Without them, patients are dealt here: in order of quality (the worse of their views) and EF, every ten
    in a row go to the ten folds as `seed` shuffles, so each fold sees all of the range; fold N is for
    testing, the next one for validation. Raises DiffEchoError for another fold, too few patients, bad lists.
    """
    root = Path(table.attrs["root"])
    worst = ("quality", "max")  # "Good", "Medium" and "Poor" are in alphabetical order
    patients = table.groupby("patient").agg(quality=worst, ef=("ef", "first"))
    if not 1 <= fold <= FOLDS <= len(patients):
        raise DiffEchoError(
            f"{root}: no fold {fold} of {len(patients)} patients; ask for 1 to {FOLDS}, of {FOLDS} "
            "patients or more"
        )
    names = {f"subgroup{fold}_{split}.txt": split for split in SPLITS}
    there = {path.name.lower(): path for path in root.glob("*/*.txt")}
    lists = {split: there[name] for name, split in names.items() if name in there}
    if lists:
        splits, problems = _read_lists(lists)
        problems += [f"{root}: no {name}; restore it" for name in names if name not in there]
        if problems:
            raise DiffEchoError("\n".join(problems))
    else:
        rng = np.random.default_rng(seed)
        patients["tie"] = rng.permutation(len(patients))
        dealt = patients.sort_values(["quality", "ef", "tie"]).index
        folds = np.concatenate([rng.permutation(FOLDS) + 1 for _ in range(0, len(dealt), FOLDS)])
        parts = {fold: "testing", fold % FOLDS + 1: "validation"}
        splits = {who: parts.get(its, "training") for who, its in zip(dealt, folds, strict=False)}
    return table.assign(split=table["patient"].map(splits))


def class_index(table):
    """Index of each row's class in `CLASSES`: (N,) int64."""
    pairs = zip(table["view"], table["phase"], strict=True)
    return np.array([CLASSES.index(pair) for pair in pairs], dtype=np.int64)


# --- the grey scale -------------------------------------------------------------------------------


def grey_levels(ranges):
    """(black, white): the values that mean black and white in a set, told from all of its frames at once.

    ranges: {path of a frame: `grey_range` of it}. 0 to 255, 0 to 1 and -1 to 1 may be overshot a little,
    as interpolation does; whole numbers beyond are taken for 10 to 16 bits. Raises DiffEchoError naming a
    file where the values are none of these, or where the frames are not all on one scale.
    """
    told = {path: r for path, r in ranges.items() if r[1] < r[2]}  # one value alone tells nothing
    if not told:
        first = next(iter(ranges))
        raise DiffEchoError(
            f"{first}: one grey value all over, as in every frame; export them again"
        )
    whole = all(r[0] for r in told.values())
    lowest, highest = min(told, key=lambda p: told[p][1]), max(told, key=lambda p: told[p][2])
    low, high = told[lowest][1], told[highest][2]
    top = min((2**bits - 1 for bits in _BITS if high < 2**bits), default=0)
    fits = {
        (0, 1): not whole and low >= -0.1 and 0.5 <= high <= 1.1,
        (-1, 1): not whole and -1.2 <= low <= -0.8 and 0.5 <= high <= 1.2,
        (0, 255): low >= -25 and 128 <= high <= 280,
        (0, top): whole and low >= -0.02 * top and 280 < high <= top,
    }
    if not any(fits.values()):
        raise DiffEchoError(
            f"{lowest if low < 0 else highest}: grey values {low:.4g} to {high:.4g} in the set, which are "
            "neither 0 to 255, 0 to 1, -1 to 1 nor 10 to 16 bits (standardised? cut off?); write the "
            "frames anew, 0 for black and 255 for white"
        )
    black, white = next(scale for scale, fitting in fits.items() if fitting)
    for path, (_, least, most) in told.items():
        darkest, brightest = ((value - black) / (white - black) for value in (least, most))
        if brightest < 0.1 or darkest > 0.4 or most <= 255 < white:
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


# --- what is decided for the whole set ------------------------------------------------------------

_SIZE_REMEDY = "write the right one (CAMUS's is 0.308), or 1 where it is unknown"


def _decide_for_the_set(table, problems):
    """Fill in, in place, what all frames share: spacing, transposed, black, white; add to the problems."""
    spacing = ["lateral_mm", "depth_mm"]
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
    table["transposed"] = transposed
    table[spacing] = sizes[:, ::-1] if transposed else sizes
    table["black"], table["white"], table.attrs["greys"] = 0, 255, "8-bit frames"
    ranges = {} if table["eight_bit"].all() else _grey_ranges(table)
    if ranges:
        with _noted(problems):
            table["black"], table["white"] = grey_levels(ranges)
        low, high = min(r[1] for r in ranges.values()), max(r[2] for r in ranges.values())
        table.attrs["greys"] = f"values from {low:.4g} to {high:.4g}"


def _grey_ranges(table):
    """{path: `grey_range`} of the readable frames, for `grey_levels`.

    Those that are not 8-bit are read, once: many of them are kept in the workspace's cache.
    """
    eight_bit = table["eight_bit"].astype(bool)
    others = table["image"][~eight_bit].tolist()

    def read():
        with ThreadPoolExecutor() as pool:
            return {"ranges": torch.tensor(list(pool.map(_file_range, others)), dtype=torch.double)}

    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in others]
    cache = assets.workspace() / "cache" if len(others) >= _FEW else None
    found = files.cached(cache, "greys", stamps, read)["ranges"].tolist()
    known = dict.fromkeys(table["image"][eight_bit], (True, 0.0, 255.0))
    return known | {path: r for path, r in zip(others, found, strict=True) if not np.isnan(r[1])}


def _file_range(path):
    try:
        return grey_range(_read_array(path)[0])
    except DiffEchoError:  # `checks` and `read_frame` report it
        return False, np.nan, np.nan


def _is_transposed(table, frames=8):
    """Whether the folder's arrays are (depth, lateral) instead of CAMUS's (lateral, depth).

    The atrium lies deeper than the ventricle in every apical view, and the ventricle deeper than the
    middle of its wall, so these lines run along the depth axis; a few label maps vote.
    """
    votes = []
    for path in table["label_map"].iloc[:: max(1, len(table) // frames)]:
        with contextlib.suppress(DiffEchoError):  # `checks` and `read_frame` report it
            mask, _ = _read_array(path)
            other = "LA" if (mask == LABELS["LA"]).any() else "myocardium"
            line = np.subtract(*(centre(mask == LABELS[name]) for name in ("LV cavity", other)))
            if np.isfinite(line).all():
                votes.append(abs(line[0]) > abs(line[1]))
    return bool(votes) and np.mean(votes) > 0.5


def centre(region):
    """Mean (row, column) of the pixels where `region` is true; NaN of none."""
    rows, columns = np.nonzero(region)
    return (rows.mean(), columns.mean()) if len(rows) else (np.nan, np.nan)


# --- the parts of a folder ------------------------------------------------------------------------


@contextlib.contextmanager
def _noted(problems):
    """Context whose DiffEchoError becomes a line of `problems`."""
    try:
        yield
    except DiffEchoError as error:
        problems.append(str(error))


def _patients(folder):
    """Its folders patientNNNN, in order."""
    return sorted(p for p in folder.iterdir() if re.fullmatch(r"patient\d+", p.name) and p.is_dir())


def _patients_dir(root):
    """ROOT/database_nifti; DiffEchoError says what is wrong with ROOT and which folder to pass."""
    expected = "the folder that holds database_nifti/"
    if not root.is_dir():
        raise DiffEchoError(f"{root}: no such folder; pass {expected}, {_CONVERT}")
    folder, where = root / "database_nifti", root.resolve()
    if folder.is_dir():
        if _patients(folder):
            return folder
        raise DiffEchoError(f"{folder}: no patientNNNN folder in it; was all of it unpacked?")
    below = sorted(root.glob("*/database_nifti"))
    if where.name == "database_nifti":
        level, holder = "one level too low", where.parent
    elif where.parent.name == "database_nifti":
        level, holder = "two levels too low", where.parents[1]
    elif below:
        level, holder = "one level too high", below[0].parent
    else:
        raise DiffEchoError(f"{root}: no database_nifti/ in it; pass {expected}, {_CONVERT}")
    raise DiffEchoError(f"{root}: {level}; pass {holder}, {expected}")


def _list_path(root, split):
    return root / "database_split" / f"subgroup_{split}.txt"


def _read_lists(paths):
    """({patient: split}, problems) of {split: path of its list}; a list that is not there is no problem."""
    splits, problems = {}, []
    for split, path in paths.items():
        if not path.exists():
            continue
        try:
            patients = path.read_text().split()
        except UnicodeDecodeError:
            problems.append(f"{path}: no plain text; write it anew, in UTF-8, one patient a line")
            continue
        if not patients:
            problems.append(f"{path}: empty list; restore it, or delete it to go without a split")
        for patient in patients:
            other = splits.setdefault(patient, split)
            if other != split:
                problems.append(f"{path}: {patient} is in {other} too; a patient has one split")
    return splits, problems


def write_lists(root, splits):
    """Write {patient: split} as the official lists; of a split without patients there is none."""
    for split in SPLITS:
        names = [f"{patient}\n" for patient, its in splits.items() if its == split]
        if names:
            path = _list_path(Path(root), split)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(names))


def _read_cfg(path):
    """Quality, EF, sex and age from an Info_*.cfg (new or older keys); {} where there is no file."""
    if not path.exists():
        return {}
    try:
        pairs = [line.split(":", 1) for line in path.read_text().splitlines() if line.strip()]
        cfg = {key.strip(): value.strip() for key, value in pairs}
        number = {k: float(cfg[k]) for k in ("EF", "LVef", "Age") if cfg.get(k, "NA") != "NA"}
    except ValueError as error:
        raise DiffEchoError(
            f"{path}: not a cfg of `key: value` lines ({error}); restore it from the release, or "
            "delete it to go without quality and EF"
        ) from None
    ef = number.get("EF", number.get("LVef"))
    return dict(quality=cfg.get("ImageQuality"), ef=ef, sex=cfg.get("Sex"), age=number.get("Age"))


def _read_pair(root, patient, view, phase):
    """Paths and header's facts of a frame and its label map; None where a re-pack has neither."""
    image, mask = (frame_path(root, patient, view, phase, mask) for mask in (False, True))
    missing = {path: other for path, other in ((image, mask), (mask, image)) if not path.exists()}
    for path in missing:
        if path.with_suffix("").exists():
            raise DiffEchoError(f"{path.with_suffix('')}: uncompressed; gzip it, {_CONVERT}")
    if len(missing) == 2:
        return None
    for path, other in missing.items():
        raise DiffEchoError(f"{path}: missing beside {other.name}; copy it, or remove both")
    lateral, depth, eight_bit = _read_header(image)
    found = dict(image=image, label_map=mask, eight_bit=eight_bit)
    return found | dict(lateral_mm=lateral, depth_mm=depth)


# --- files ----------------------------------------------------------------------------------------


def read_nifti(path):
    """(array, spacing) of a NIfTI file as its affine lays it: (lateral, depth), mm a pixel or NaN.

    Raises DiffEchoError, beginning with the path, for what cannot be read and for an impossible spacing.
    """
    lateral, depth, _ = _read_header(path)
    if not _possible(lateral, depth):
        raise DiffEchoError(f"{path}: pixel size {lateral:g} x {depth:g} mm; {_SIZE_REMEDY}")
    unknown = (lateral, depth) == (1, 1)
    return _read_array(path)[0], (np.nan, np.nan) if unknown else (lateral, depth)


def write_nifti(path, array, lateral, depth):
    """Write an array (lateral, depth) of so many mm a pixel as CAMUS does; same input, same bytes."""
    nifti = nib.Nifti1Image(array, np.diag([-lateral, -depth, 1, 1]))
    path.write_bytes(gzip.compress(nifti.to_bytes(), compresslevel=3, mtime=0))


def _possible(lateral, depth):
    """Whether both are pixel sizes in mm that an echocardiogram can have (1 is the usual placeholder)."""
    return 0.01 <= lateral <= 10 and 0.01 <= depth <= 10


@contextlib.contextmanager
def _reading(path):
    try:
        yield
    except _UNREADABLE as error:
        raise DiffEchoError(f"{path}: unreadable ({error}); copy or download it again") from None


def _read_header(path):
    """(mm along the first axis, along the second, whether 8-bit as it is), the axes as the affine lays them.

    A quarter of nibabel.load's time, which thousands of files feel.
    """
    with _reading(path):
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
            header = nib.Nifti1Header(file.read(348), check=False)
        if header["sizeof_hdr"] != 348:
            raise OSError("no NIfTI header")
        eight_bit, turns = header.get_data_dtype() == np.uint8, _turns(header)
        sizes = zip(header.get_zooms(), header.get_data_shape(), strict=True)
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    eight_bit &= slope == 0 or np.isnan(slope) or (slope == 1 and inter == 0)
    spacing = [float(zoom) for zoom, n in sizes if n > 1][:2]
    if len(spacing) < 2:  # no picture; reading the array says so
        spacing = [1.0, 1.0]
    return *(spacing[::-1] if turns and turns[0] else spacing), bool(eight_bit)


def _read_array(path):
    """(the file's array as its affine lays it, `_turns`): finite, of two dimensions."""
    with _reading(path):
        image = nib.load(path)
        array, turns = np.asanyarray(image.dataobj), _turns(image.header)
    array = array.reshape([n for n in array.shape if n > 1])  # (H, W, 1) is a 2-D frame too
    if array.ndim != 2:
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
