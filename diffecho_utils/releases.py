"""CAMUS in the forms people have it: recognise one, convert it to the official layout.

Chapter 01. `camus.py` reads the official layout alone; whatever else is passed as data is written in
that layout first, once. The forms, and what tells them:

    official  a folder that holds `database_nifti/` (the NIfTI release, the phantom)
    mhd       the older release: `patientNNNN/patientNNNN_{2CH,4CH}_{ED,ES}[_gt].mhd` and cfg files, in
              the folder or below (`training/`, `testing/`); its pixels are oblong
    hdf5      the re-pack that the paper used: a file (or a folder with one) with the arrays
              `train {2ch,4ch} {ED,ES} {frames,masks}`, (N, H, W, 1) each, patients without names
    png       pictures named as the paper's script names them, `ch2_ed_frame_0.png` and
              `ch2_ed_mask_0.png`, or as CAMUS does, `patient0001_2CH_ED.png` and
              `patient0001_2CH_ED_gt.png`, in any folders; 8 or 16 bits, grey values in every channel
    nifti     `.nii` or `.nii.gz` files named as CAMUS does, in other folders than the official ones
              (nnU-Net's `imagesTr/patient0001_2CH_ED_0000.nii.gz` among them), or uncompressed

A label map ends in `_gt`, or lies in a folder named masks, labels, labelsTr or annotations under the
frame's own name (behind which a channel, `_0000`, or a split, `_training`, may stand). They hold 0-3, or
0/85/170/255 in hdf5 and png. Patients without a name become patient0001 and on, in order: not CAMUS's own
numbers. Folders named train*, val* and test*, or nnU-Net's, give the splits where no list does; in an
hdf5 file subjects 0-49 are for validation, as in the paper's code. Half sequences are left out: nothing
here reads them.
"""

import contextlib
import filecmp
import hashlib
import json
import re
import shutil
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from diffecho_utils import DiffEchoError, assets, camus, files

_ENDS = {"mhd": (".mhd",), "nifti": (".nii", ".nii.gz"), "png": (".png",)}  # of a form's pictures
_NAMES = (  # of a picture, without its end: CAMUS's own, and those of the paper's script
    r"(?P<patient>patient\d+)_(?P<view>2CH|4CH)_(?P<phase>ED|ES)(?P<mask>_gt)?"
    r"(?:_0000|_training|_validation|_testing)?",  # of no meaning here
    r"ch(?P<view>[24])_(?P<phase>ED|ES)_(?:frame|(?P<mask>mask))_(?P<index>\d+)",
)
_MASK_FOLDER = r"(?:.*_)?(?:masks?|annotations?|labels?|gt)(?:Tr|Ts)?"
_SPLIT_FOLDERS = {
    "training": r"train.*|(?:images|labels)Tr",
    "validation": r"val.*",
    "testing": r"test.*|(?:images|labels)Ts",
}
_AS_THEY_ARE = (0, 255)  # black and white of nearly every set
_NO_SPACING = (np.nan, np.nan)
PAPER_VALIDATION = 50  # the paper's code validates on the first 50 subjects of the HDF5 file


@dataclass(frozen=True)
class Release:
    """What `recognise` found.

    form: "official", "mhd", "hdf5", "png" or "nifti"; pictures: {patient: {end of a file name in the
    official layout, e.g. "2CH_ED_gt": a file, or (HDF5 file, array's name, index)}}; splits: {patient:
    split}; notes: what a user should know of it, in sentences. `pictures` is empty for the official layout.
    """

    path: Path
    form: str
    pictures: dict
    splits: dict
    notes: tuple


def recognise(path):
    """Say what a file or folder is, as a `Release`. Raises DiffEchoError where it is none of the forms."""
    path = Path(path)
    if path.is_file():
        return _recognise_hdf5(path)
    if not path.is_dir():
        raise DiffEchoError(f"{path}: no such file or folder; pass one that holds CAMUS")
    if (path / "database_nifti").is_dir():
        plain = (path / "database_nifti").glob("*/patient*.nii")
        if all(p.with_name(f"{p.name}.gz").exists() for p in plain):
            return Release(path, "official", {}, {}, ())
    elif "database_nifti" in path.resolve().parts[-2:] or any(path.glob("*/database_nifti")):
        return Release(path, "official", {}, {}, ())  # `camus.read_table` names the folder to pass
    found = sorted(p for p in path.rglob("*") if not p.name.startswith("."))
    for form, ends in _ENDS.items():
        named = [p for p in found if p.name.lower().endswith(ends)]
        keys = {p: key for p in named if (key := _key(p.relative_to(path)))}
        if keys:
            return _recognise_pictures(path, form, keys)
    archives = [p for p in found if p.suffix in (".h5", ".hdf5")]
    if len(archives) == 1:
        return _recognise_hdf5(archives[0])
    raise DiffEchoError(
        f"{path}: CAMUS in none of its forms: no database_nifti/, patientNNNN_2CH_ED.nii.gz, .mhd or .png "
        f"and no ch2_ed_frame_N.png in it, and {len(archives)} HDF5 files; pass the folder (or the HDF5 "
        "file) that holds the frames"
    )


def official(path, progress=None):
    """Folder in the official layout for CAMUS in any form: `path` itself, or what it was converted to.

    Conversions are kept in the workspace's cache under the source's files (name, size, time), so the
    second call costs a listing. Raises DiffEchoError as `recognise` and `convert` do.
    """
    release = recognise(path)
    if release.form == "official":
        return Path(path)
    parts = [release.path] if release.path.is_file() else sorted(release.path.rglob("*"))
    found = [(str(p.resolve()), p.stat()) for p in parts if p.is_file()]
    stamps = [(name, status.st_size, status.st_mtime_ns) for name, status in found]
    digest = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16]
    folder = assets.workspace() / "cache" / f"camus-{release.form}-{digest}"
    if not folder.is_dir():
        try:
            convert(path, folder, progress)
        except (OSError, DiffEchoError):
            if not folder.is_dir():  # else another process was faster
                raise
    return folder


def convert(source, dest, progress=None):
    """Write CAMUS, in any other form, to the new folder `dest` in the official layout; returns a `Release`.

    Pixels, labels and spacing stay as they are, but for the grey scale, which is 0 to 255 afterwards: one
    for all frames, told from all of them (`camus.grey_levels`); uint8, or float32 where the source has
    another type. 1.0 mm is the placeholder where the source knows no spacing. cfg files and lists are
    copied; the form and the notes go to `dataset.json`. `dest` appears whole or not at all.
    `progress(done, total, unit)` counts patients. Raises DiffEchoError, beginning with the path, for what
    cannot be read, is no label map, or has no scale that can be told.
    """
    release = recognise(source)
    if release.form == "official":
        camus.read_table(source)  # says which folder to pass
        raise DiffEchoError(f"{source}: in the official layout already; pass it as it is")
    with files.whole_folder(dest) as draft, _reader(release) as read:
        scale = camus.grey_levels(_write_patients(release, draft, read, _AS_THEY_ARE, progress))
        if scale != _AS_THEY_ARE:  # which only all of them together tell: written anew
            _write_patients(release, draft, read, scale, progress)
            greys = f"grey values: {scale[0]:g} was taken for black, {scale[1]:g} for white"
            release = replace(release, notes=(*release.notes, greys))
        _write_lists(release, draft)
        facts = {"world": camus.world(source), "form": release.form, "notes": release.notes}
        (draft / "dataset.json").write_text(json.dumps(facts, indent=1) + "\n")
    return release


# --- recognising ----------------------------------------------------------------------------------


def _recognise_hdf5(path):
    if not h5py.is_hdf5(path):
        raise DiffEchoError(f"{path}: no HDF5 file; unpack archives, and pass the frames' folder")
    arrays = {
        f"{view}_{phase}{end}": f"train {view.lower()} {phase} {kind}"
        for view, phase in camus.CLASSES
        for kind, end in (("frames", ""), ("masks", "_gt"))
    }
    with h5py.File(path, "r") as file:
        there = sorted(file)
        for key in arrays.values():
            if key not in there:
                raise DiffEchoError(f"{path}: no array {key!r}, only {there}; pass another re-pack")
        counts = {key: len(file[key]) for key in arrays.values()}
    if len(set(counts.values())) > 1:
        raise DiffEchoError(f"{path}: arrays of different lengths {counts}; download it again")
    names = [f"patient{number:04d}" for number in range(1, max(counts.values()) + 1)]
    pictures = {
        patient: {name: (path, key, index) for name, key in arrays.items()}
        for index, patient in enumerate(names)
    }
    notes = ["patients are numbered in the file's order: not CAMUS's own numbers"]
    splits, first = {}, PAPER_VALIDATION
    if len(names) > first:
        splits = dict.fromkeys(names[:first], "validation")
        splits |= dict.fromkeys(names[first:], "training")
        notes.append(f"the first {first} patients are for validation, as in the paper's code")
    return Release(path, "hdf5", pictures, splits, tuple(notes))


def _recognise_pictures(path, form, keys):
    """`Release` of files with their `_key`s: frames without label map (the old testing set) are left out."""
    groups, copies, alone = defaultdict(dict), [], []
    for file, (patient, name) in keys.items():
        group = groups[patient, _split(file.relative_to(path))]
        if group.setdefault(name, file) is not file:
            copies.append(file)
            if not filecmp.cmp(file, group[name], shallow=False):
                raise DiffEchoError(f"{file}: another one is {group[name]}; leave one of the two")
    pictures, splits = {}, {}
    for (patient, split), group in sorted(groups.items()):
        whole = {name for name in group if f"{name}_gt" in group}
        whole |= {f"{name}_gt" for name in whole}
        alone += [group.pop(name) for name in sorted(set(group) - whole)]
        if not group:
            continue
        if patient in pictures:
            where = f"{splits[patient]} and {split} folders"
            raise DiffEchoError(f"{path}: {patient} is under {where}; convert them apart")
        pictures[patient], splits[patient] = group, split
    if not pictures:
        raise DiffEchoError(f"{path}: {len(alone)} frames, none with its label map; add the maps")
    told = {
        "files without their label map or frame left out": alone,
        "files that are there twice taken once": copies,
    }
    notes = [f"{len(which)} {what}, {which[0]} the first" for what, which in told.items() if which]
    if re.fullmatch(_NAMES[1], next(iter(keys)).stem, re.I):
        notes.append("patients are numbered as the files, from 1: not CAMUS's own numbers")
    return Release(path, form, pictures, splits, tuple(notes))


def _key(path):
    """(patient, end of the official file name) of a file's path, e.g. ("patient0001", "2CH_ED_gt"); or None."""
    stem = re.sub(r"\.nii$", "", path.stem, flags=re.I)
    for pattern in _NAMES:
        if match := re.fullmatch(pattern, stem, re.I):
            found = match.groupdict()
            patient = found.get("patient") or f"patient{int(found['index']) + 1:04d}"
            folders = path.parts[:-1]
            mask = found["mask"] or any(re.fullmatch(_MASK_FOLDER, f, re.I) for f in folders)
            end = f"{found['view'][0]}CH_{found['phase'].upper()}{'_gt' if mask else ''}"
            return patient.lower(), end
    return None


def _split(path):
    """The split that the last telling folder above a file names, "" where none does."""
    for folder in reversed(path.parts[:-1]):
        for split, pattern in _SPLIT_FOLDERS.items():
            if re.fullmatch(pattern, folder, re.I):
                return split
    return ""


# --- converting -----------------------------------------------------------------------------------


def _write_patients(release, draft, read, scale, progress):
    """Write every patient with greys on this (black, white); returns the sources' own `camus.grey_range`s."""
    ranges = {}

    def write(item):
        patient, pictures = item
        return _write_patient(draft / "database_nifti" / patient, pictures, read, scale)

    with ThreadPoolExecutor() as pool:
        for done, found in enumerate(pool.map(write, release.pictures.items()), start=1):
            ranges |= found
            if progress:
                progress(done, len(release.pictures), "patients")
    return ranges


def _write_patient(folder, pictures, read, scale):
    folder.mkdir(parents=True, exist_ok=True)
    shapes, ranges = {}, {}
    for name, source in pictures.items():
        array, spacing = _checked(read, source)
        if name.endswith("_gt"):
            array = _labels(array, source)
        else:
            ranges[_place(source)] = camus.grey_range(array)
            if array.dtype != np.uint8 or scale != _AS_THEY_ARE:
                array = camus.scaled(array, *scale)
        shapes[name] = array.shape
        spacing = (1.0, 1.0) if np.isnan(spacing).any() else spacing
        camus.write_nifti(folder / f"{folder.name}_{name}.nii.gz", array.T, *spacing)
    for name, shape in shapes.items():
        if shape != shapes.get(f"{name}_gt", shape):
            raise DiffEchoError(
                f"{_place(pictures[name])}: shape {shape}, its label map {shapes[f'{name}_gt']}; take "
                "both from the same release"
            )
    if isinstance(source, Path):
        for cfg in source.parent.glob("Info_*.cfg"):
            shutil.copyfile(cfg, folder / cfg.name)
    return ranges


def _checked(read, source):
    """What `read` gives, without axes of length 1; DiffEchoError for what cannot be a picture."""
    try:
        array, spacing = read(source)
    except DiffEchoError:
        raise
    except (OSError, ValueError) as error:
        raise DiffEchoError(f"{_place(source)}: unreadable ({error}); copy it again") from None
    array = np.squeeze(array)
    if array.ndim != 2 or not np.isfinite(array).all():
        what = f"shape {array.shape}, or values that are not finite"
        raise DiffEchoError(f"{_place(source)}: {what}; copy it again")
    return array, spacing


@contextlib.contextmanager
def _reader(release):
    """Context of read(source) for a form: an array, rows = depth, and (lateral, depth) in mm or NaN."""
    if release.form != "hdf5":
        yield {"mhd": _read_mhd, "nifti": _read_nifti, "png": _read_png}[release.form]
        return
    # A chunk may span many subjects: the cache keeps a file from being unpacked once a subject.
    with h5py.File(release.path, "r", rdcc_nbytes=2**26, rdcc_nslots=10007) as file:
        yield lambda source: (file[source[1]][source[2]], _NO_SPACING)


def _read_nifti(source):
    array, spacing = camus.read_nifti(source)
    return array.T, spacing


def _read_mhd(source):
    try:
        import SimpleITK

        image = SimpleITK.ReadImage(str(source))
    except ImportError:
        raise DiffEchoError(f"{source}: mhd needs SimpleITK; pip install SimpleITK") from None
    except RuntimeError:  # which says many lines, the last of them often wrong
        raise OSError("header or pixel file missing, damaged or too short") from None
    array, steps = SimpleITK.GetArrayFromImage(image), image.GetDirection()
    steps = steps[0], steps[image.GetDimension() + 1]  # of its matrix's diagonal
    return np.flip(array, [-1 - axis for axis in (0, 1) if steps[axis] < 0]), image.GetSpacing()[:2]


def _read_png(source):
    with Image.open(source) as image:
        if image.mode not in ("L", "LA", "RGB", "RGBA", "I;16", "I"):
            raise ValueError(f"mode {image.mode}, not grey of 8 or 16 bits")
        return np.asarray(image if "I" in image.mode else image.convert("L")), _NO_SPACING


def _labels(array, source):
    """Label map 0-3 (uint8) from levels 0-3 or 0/85/170/255; {0, 255} alone would be some other mask."""
    levels = set(np.unique(array).tolist())
    if levels <= set(camus.LABELS.values()):
        return array.astype(np.uint8)
    if levels <= {0, 85, 170, 255} and levels != {0, 255}:
        return (array // 85).astype(np.uint8)
    raise DiffEchoError(
        f"{_place(source)}: levels {sorted(levels)[:6]}, neither 0-3 nor 0/85/170/255; write label maps "
        "without resampling or stretching (matplotlib: imsave(..., vmin=0, vmax=3))"
    )


def _place(source):
    return source if isinstance(source, Path) else "{}: {}[{}]".format(*source)


def _write_lists(release, draft):
    """The source's own `subgroup*.txt` lists, or those that its folders or order imply."""
    found = [] if release.path.is_file() else release.path.rglob("*.txt")
    own = {p.name.lower(): p for p in found if p.name.lower().startswith("subgroup")}
    (draft / "database_split").mkdir()
    for name, path in own.items():
        shutil.copyfile(path, draft / "database_split" / name)
    if not any(name.startswith("subgroup_") for name in own):
        camus.write_lists(draft, release.splits)
