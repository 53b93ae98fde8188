"""CAMUS on disk: a folder becomes a table of frames, and a row of the table becomes arrays.

Chapter 01. The layout is the official NIfTI release's (Leclerc et al. 2019):

    ROOT/database_nifti/patientNNNN/patientNNNN_{2CH,4CH}_{ED,ES}[_gt].nii.gz, Info_{2CH,4CH}.cfg
    ROOT/database_split/subgroup_{training,validation,testing}.txt

Every public function works on that layout and on nothing else, so the phantom (`phantom.py`), the
official download and any re-pack of it (`releases.py` converts them) take the same road.
"""

import gzip
import json
import re
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

from diffecho_utils import DiffEchoError

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
_OR_CONVERT = (
    ", or convert other forms of CAMUS first: python -m diffecho_utils convert SOURCE DEST"
)


def frame_path(root, patient, view, phase, mask=False):
    """Path of one frame, or of its label map, in the official layout."""
    name = f"{patient}_{view}_{phase}{'_gt' if mask else ''}.nii.gz"
    return Path(root) / "database_nifti" / patient / name


def world(root):
    """Name of the world a folder belongs to, for provenance: what its `dataset.json` says, else "camus"."""
    path = Path(root) / "dataset.json"
    if not path.is_file():
        return "camus"
    try:
        return json.loads(path.read_text())["world"]
    except (ValueError, KeyError, TypeError) as error:
        raise DiffEchoError(
            f"{path}: no `world` to read in it ({error}); delete or restore it"
        ) from None


def read_table(root):
    """Table of the frames under `root`, one row a frame, in order of patient, view, phase.

    Columns: patient, view ("2CH"/"4CH"), phase ("ED"/"ES"), split ("training"/"validation"/
    "testing", None where no list names the patient), image and label_map (paths), lateral_mm and
    depth_mm (pixel spacing; NaN where the header holds the placeholder 1.0), and from the cfg files
    quality ("Good"/"Medium"/"Poor"), ef (%), sex, age (years): missing where a cfg is silent.
    `table.attrs` holds root and world.

    Raises DiffEchoError listing what is wrong with the files' names, lists and headers; the arrays
    themselves are read by `read_frame` and, all at once, by `check`.
    """
    table, problems = _scan(root)
    if problems:
        rest = f"; {len(problems) - 5} more" if len(problems) > 5 else ""
        hint = f"(python -m diffecho_utils check {root} looks into every file{rest})"
        raise DiffEchoError("\n".join([*problems[:5], hint]))
    return table


def check(root, progress=None):
    """Everything wrong with the folder `root`: a list of lines "path: problem; remedy".

    Reads every array: each frame must be 2-D and finite, each label map of the same shape with
    labels 0 to 3 only. `progress(done, total)` is called after each frame. Never raises for bad data.
    """
    table, problems = _scan(root)
    for done, row in enumerate(table.itertuples(), start=1):
        try:
            read_frame(row)
        except DiffEchoError as error:
            problems.append(str(error))
        if progress:
            progress(done, len(table))
    return problems


def read_frame(row):
    """One frame as a picture: (image, mask), rows = depth from the probe down, columns = lateral.

    `row` is a row of `read_table` (from `itertuples` or `iloc`). image: (H, W) float32 in 0..255,
    mask: (H, W) uint8 with CAMUS labels. The file's own axis order (lateral, depth in the official
    release; depth, lateral where a tool wrote it transposed) is undone here and nowhere else.
    Raises DiffEchoError, beginning with the path, for an unreadable or unusable file.
    """
    image = _read_array(row.image)
    mask = _read_array(row.label_map)
    if image.shape != mask.shape:
        raise DiffEchoError(
            f"{row.label_map}: shape {mask.shape} differs from the frame's {image.shape} in "
            f"{Path(row.image).name}; take both from the same release"
        )
    labels = np.unique(mask)
    unknown = [float(value) for value in labels if value not in LABELS.values()]
    if unknown:
        raise DiffEchoError(
            f"{row.label_map}: labels {unknown[:5]} besides 0-3; a resized label map must be made by "
            "nearest neighbour, and other label sets mapped to CAMUS's 0-3"
        )
    if row.transposed:
        image, mask = image.T, mask.T
    return image.T.astype(np.float32), mask.T.astype(np.uint8)


def read_sequence(root, patient, view):
    """The half sequence ED..ES of one view: (T, H, W) float32 in 0..255, pictures as in `read_frame`."""
    path = Path(root) / "database_nifti" / patient / f"{patient}_{view}_half_sequence.nii.gz"
    return np.moveaxis(_read_array(path, dimensions=3), (0, 1, 2), (2, 1, 0)).astype(np.float32)


def select(table, split=None, view=None, phase=None, patients=None):
    """Rows of the table with this split, view and phase, of the first `patients` patients; never empty.

    Raises DiffEchoError that says what the table has instead.
    """
    keep = pd.Series(True, index=table.index)
    for column, value in (("split", split), ("view", view), ("phase", phase)):
        if value is not None:
            keep &= table[column] == value
    rows = table[keep]
    if patients is not None:
        rows = rows[rows.patient.isin(rows.patient.unique()[:patients])]
    if rows.empty:
        counts = table.groupby("split", dropna=False).patient.nunique().to_dict()
        raise DiffEchoError(
            f"{table.attrs.get('root')}: no frame with split={split}, view={view}, phase={phase}; "
            f"patients in each split: {counts}"
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


def _scan(root):
    """(table, problems) from names, lists, cfg files and headers, without reading an array."""
    root = Path(root)
    try:
        patients_dir = _patients_dir(root)
    except DiffEchoError as error:
        return _frame([], root), [str(error)]
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
            f"{patients_dir}: no patientNNNN_{{2CH,4CH}}_{{ED,ES}}.nii.gz in its folders"
        )
    present = {row["patient"] for row in rows}
    for split in SPLITS if rows else ():
        listed = {patient for patient, name in splits.items() if name == split}
        if listed and not listed & present:
            problems.append(
                f"{_split_path(root, split)}: none of its patients is in database_nifti"
            )
    return _frame(rows, root), problems


def _frame(rows, root):
    table = pd.DataFrame(rows, columns=COLUMNS + CFG_COLUMNS)
    table["transposed"] = _is_transposed(table)
    if len(table) and table["transposed"].iloc[0]:
        table[["lateral_mm", "depth_mm"]] = table[["depth_mm", "lateral_mm"]].to_numpy()
    table.attrs = {"root": str(root), "world": world(root)}
    return table


def _read_pair(root, patient, view, phase):
    """Paths and spacing of a frame and its label map; None where a re-pack has neither."""
    image, mask = (frame_path(root, patient, view, phase, mask) for mask in (False, True))
    if not image.exists() and not mask.exists():
        return None
    for path, kind in ((image, "frame"), (mask, "label map")):
        if not path.exists():
            partner = (mask if kind == "frame" else image).name
            raise DiffEchoError(f"{path}: {kind} missing beside {partner}; copy it, or remove both")
    lateral, depth = _read_spacing(image)
    return dict(image=image, label_map=mask, lateral_mm=lateral, depth_mm=depth)


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
    if _is_patient(root):
        raise DiffEchoError(
            f"{root}: two levels too low; pass {root.resolve().parents[1]}, {expected}"
        )
    if any(_is_patient(p) for p in root.iterdir()):
        raise DiffEchoError(f"{root}: one level too low; pass {root.resolve().parent}, {expected}")
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
        patients = path.read_text().split()
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


def _load(path):
    try:
        return nib.load(path)
    except (OSError, EOFError, zlib.error, nib.filebasedimages.ImageFileError) as error:
        raise DiffEchoError(f"{path}: unreadable ({error}); copy or download it again") from None


def _read_spacing(path):
    """Pixel spacing (mm along the first axis, along the second), NaN for the placeholder 1.0 x 1.0."""
    try:
        with gzip.open(
            path
        ) as file:  # a tenth of nibabel.load's time, which thousands of files feel
            header = nib.Nifti1Header(file.read(348), check=False)
        if header["sizeof_hdr"] != 348:
            raise OSError("no NIfTI header")
    except (OSError, EOFError, zlib.error, nib.wrapstruct.WrapStructError) as error:
        raise DiffEchoError(f"{path}: unreadable ({error}); copy or download it again") from None
    spacing = tuple(float(z) for z in header.get_zooms()[:2])
    return (np.nan, np.nan) if spacing == (1.0, 1.0) else spacing


def _read_array(path, dimensions=2):
    """The file's array, finite and of the expected number of dimensions."""
    image = _load(path)
    try:
        array = np.asanyarray(image.dataobj)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DiffEchoError(f"{path}: truncated ({error}); copy or download it again") from None
    array = array.reshape([n for n in array.shape if n > 1])  # (H, W, 1) is a 2-D frame too
    if array.ndim != dimensions:
        kind = "a half sequence where a single frame is expected" if array.ndim == 3 else "no image"
        raise DiffEchoError(f"{path}: shape {array.shape}, {kind}; restore the file of this name")
    if not np.isfinite(array).all():
        raise DiffEchoError(f"{path}: holds NaN or infinite values; copy or download it again")
    return array


def _is_transposed(table, frames=8):
    """Whether the folder's arrays are (depth, lateral) instead of CAMUS's (lateral, depth).

    The atrium lies deeper than the ventricle in every apical view, so the line from LV to LA runs
    along the depth axis; a few label maps vote.
    """
    votes = []
    for path in table["label_map"].iloc[:: max(1, len(table) // frames)]:
        try:
            mask = _read_array(path)
        except DiffEchoError:
            continue  # `check` and `read_frame` report it
        if (mask == LABELS["LV cavity"]).any() and (mask == LABELS["LA"]).any():
            ventricle, atrium = (
                np.argwhere(mask == LABELS[name]).mean(0) for name in ("LV cavity", "LA")
            )
            first, second = np.abs(atrium - ventricle)
            votes.append(first > second)
    return bool(votes) and np.mean(votes) > 0.5
