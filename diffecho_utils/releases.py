"""CAMUS in the forms people have it: recognise one, convert it to the official layout.

Chapter 01. `camus.py` reads the official layout alone; whatever else is passed as data is written in
that layout first, once. The forms, and what tells them:

    official  a folder that holds `database_nifti/` (the NIfTI release, the phantom)
    mhd       the older release: `patientNNNN/patientNNNN_{2CH,4CH}_{ED,ES,sequence}[_gt].mhd` and cfg
              files, in the folder or below (`training/`, `testing/`); its pixels are oblong
    hdf5      the re-pack that the paper used: a file (or a folder with one) with the arrays
              `train {2ch,4ch} {ED,ES} {frames,masks}`, (N, H, W, 1) each, patients without names
    png       pictures named as the paper's script names them, `ch2_ed_frame_0.png` and
              `ch2_ed_mask_0.png`, or as CAMUS does, `patient0001_2CH_ED.png` and
              `patient0001_2CH_ED_gt.png`, in any folders; 8 bits, grey values in every channel

Label maps hold 0-3, or 0/85/170/255 in hdf5 and png. Patients without a name become patient0001 and
on, in order: not CAMUS's own numbers. Folders named train*, val* and test* give the splits where no
list does; in an hdf5 file subjects 0-49 are for validation, as in the paper's code.
"""

import contextlib
import errno
import gzip
import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from diffecho_utils import DiffEchoError, assets, camus

_NAMED = r"(patient\d+)_(2CH|4CH)_(ED|ES|(?:half_)?sequence)(_gt)?"
_PAPER = r"ch([24])_(ed|es)_(frame|mask)_(\d+)"
_SPLIT_FOLDERS = {"train": "training", "val": "validation", "test": "testing"}


@dataclass(frozen=True)
class Release:
    """What `recognise` found.

    form: "official", "mhd", "hdf5" or "png"; pictures: {patient: {end of a file name in the official
    layout, e.g. "2CH_ED_gt": a file, or (HDF5 data set, index)}}; splits: {patient: split}; notes:
    what a user should know of it, in sentences. `pictures` is empty for the official layout.
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
        return Release(path, "official", {}, {}, ())
    files = sorted(
        p for p in path.rglob("*") if p.suffix in (".mhd", ".png", ".h5", ".hdf5", ".gz")
    )
    for suffix in (".mhd", ".png"):
        pictures = [(p, k) for p in files if p.suffix == suffix and (k := _key(p.stem))]
        if pictures:
            return _recognise_pictures(path, suffix[1:], pictures)
    archives = [p for p in files if p.suffix in (".h5", ".hdf5")]
    if len(archives) == 1:
        return _recognise_hdf5(archives[0])
    if any(re.fullmatch(rf"{_NAMED}\.nii\.gz", p.name) for p in files):
        return Release(path, "official", {}, {}, ())  # `camus.read_table` names the folder to pass
    raise DiffEchoError(
        f"{path}: CAMUS in none of its forms: no database_nifti/, patientNNNN_2CH_ED.mhd, "
        f"ch2_ed_frame_N.png or patientNNNN_2CH_ED.png in it, and {len(archives)} HDF5 files; pass the "
        "folder (or the HDF5 file) that holds the frames"
    )


def official(path, progress=None):
    """Folder in the official layout for CAMUS in any form: `path` itself, or what it was converted to.

    Conversions are kept in the workspace's cache under the source's files (name, size, time), so the
    second call costs a listing. Raises DiffEchoError as `recognise` and `convert` do.
    """
    release = recognise(path)
    if release.form == "official":
        return Path(path)
    files = [release.path] if release.path.is_file() else sorted(release.path.rglob("*"))
    status = [
        (str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.is_file()
    ]
    digest = hashlib.sha256(json.dumps(status).encode()).hexdigest()[:16]
    folder = assets.workspace() / "cache" / f"camus-{release.form}-{digest}"
    if not folder.is_dir():
        try:
            convert(path, folder, progress)
        except (OSError, DiffEchoError):
            if not folder.is_dir():  # else another process was faster
                raise
    return folder


def open_table(path, progress=None):
    """`camus.read_table` for CAMUS in any form."""
    return camus.read_table(official(path, progress))


def convert(source, dest, progress=None):
    """Write CAMUS, in any other form, to the new folder `dest` in the official layout; returns a `Release`.

    Pixels, labels and spacing stay as they are: grey values as uint8 (float32 where the source has
    another type; floats of at most 1 are multiplied by 255), 1.0 mm as the placeholder where the
    source knows no spacing. cfg files and lists are copied; the form and the notes go to
    `dataset.json`. `dest` appears whole or not at all. `progress(done, total)` counts patients.
    Raises DiffEchoError, beginning with the path, for what cannot be read or is no label map.
    """
    release = recognise(source)
    if release.form == "official":
        raise DiffEchoError(f"{source}: in the official layout already; pass it as it is")
    with whole_folder(dest) as draft, ThreadPoolExecutor() as pool:
        jobs = ((draft, patient, pictures) for patient, pictures in release.pictures.items())
        for done, _ in enumerate(pool.map(_write_patient, jobs), start=1):
            if progress:
                progress(done, len(release.pictures))
        _write_lists(release, draft / "database_split")
        facts = {"world": camus.world(source), "form": release.form, "notes": release.notes}
        (draft / "dataset.json").write_text(json.dumps(facts, indent=1) + "\n")
    return release


@contextlib.contextmanager
def whole_folder(dest):
    """Context of a draft folder beside the new folder `dest`: renamed to it at the end, or removed.

    Raises DiffEchoError where `dest` exists and where the disk is full.
    """
    dest = Path(dest)
    if dest.exists():
        raise DiffEchoError(f"{dest}: exists; name a new folder, or delete it")
    draft = dest.with_name(f".{dest.name}.{os.getpid()}.part")
    try:
        draft.mkdir(parents=True)
        yield draft
        os.replace(draft, dest)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DiffEchoError(
            f"{dest.parent}: the disk is full; free space on it, or name a folder on another one, and "
            "run the same command again"
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


# --- recognising ----------------------------------------------------------------------------------


def _recognise_hdf5(path):
    import h5py

    if not h5py.is_hdf5(path):
        raise DiffEchoError(
            f"{path}: no HDF5 file; unpack archives, and pass the folder with the frames"
        )
    # A chunk may span many subjects: the cache keeps a file from being unpacked once a subject.
    file = h5py.File(path, "r", rdcc_nbytes=2**26, rdcc_nslots=10007)
    arrays = {}
    for view, phase in camus.CLASSES:
        for kind, end in (("frames", ""), ("masks", "_gt")):
            key = f"train {view.lower()} {phase} {kind}"
            if key not in file:
                raise DiffEchoError(
                    f"{path}: no array {key!r} in it, only {sorted(file)}; pass the subject-based re-pack"
                )
            arrays[f"{view}_{phase}{end}"] = file[key]
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        raise DiffEchoError(f"{path}: arrays of different lengths {counts}; download it again")
    names = [f"patient{number:04d}" for number in range(1, max(counts.values()) + 1)]
    pictures = {
        patient: {name: (array, index) for name, array in arrays.items()}
        for index, patient in enumerate(names)
    }
    notes = ["patients are numbered in the file's order: not CAMUS's own numbers"]
    splits = {}
    if len(names) > camus.PAPER_VALIDATION:
        first = camus.PAPER_VALIDATION
        splits = {p: "validation" if p in names[:first] else "training" for p in names}
        notes.append(f"the first {first} patients are for validation, as in the paper's code")
    return Release(path, "hdf5", pictures, splits, tuple(notes))


def _recognise_pictures(path, form, files):
    """`Release` of files with their `_key`s: frames without label map (the old testing set) are left out."""
    groups = {}
    for file, (patient, name) in files:
        folders = file.relative_to(path).parts[:-1]
        splits = [s for f in folders for start, s in _SPLIT_FOLDERS.items() if f.startswith(start)]
        group = groups.setdefault((patient, (splits or [""])[-1]), {})
        if name in group:
            raise DiffEchoError(
                f"{file}: {patient} {name} is {group[name]} too; pass one of the two folders"
            )
        group[name] = file
    pictures, chosen, alone = {}, {}, []
    for (patient, split), group in sorted(groups.items()):
        frames = {name for name in group if "sequence" not in name}
        lone = {n for n in frames if (n[:-3] if n.endswith("_gt") else f"{n}_gt") not in group}
        alone += [group.pop(name) for name in sorted(lone)]
        if frames == lone:
            continue
        if patient in pictures:
            raise DiffEchoError(
                f"{path}: {patient} is under {chosen[patient]} and {split} folders; convert them apart"
            )
        pictures[patient], chosen[patient] = group, split
    if not pictures:
        raise DiffEchoError(
            f"{path}: {len(alone)} frames, none with its label map; add the label maps"
        )
    notes = []
    if alone:
        notes.append(
            f"{len(alone)} files without their label map or frame left out, {alone[0]} the first"
        )
    if re.fullmatch(_PAPER, files[0][0].stem):
        notes.append("patients are numbered as the files, from 1: not CAMUS's own numbers")
    return Release(path, form, pictures, chosen, tuple(notes))


def _key(stem):
    """(patient, end of the official file name) of a file's stem, e.g. ("patient0001", "2CH_ED_gt"); or None."""
    if match := re.fullmatch(_NAMED, stem):
        patient, view, phase, end = match.groups(default="")
        return patient, f"{view}_{'half_sequence' if 'sequence' in phase else phase}{end}"
    if match := re.fullmatch(_PAPER, stem):
        view, phase, kind, index = match.groups()
        end = "_gt" if kind == "mask" else ""
        return f"patient{int(index) + 1:04d}", f"{view}CH_{phase.upper()}{end}"
    return None


# --- converting -----------------------------------------------------------------------------------


def _write_patient(job):
    draft, patient, pictures = job
    folder = draft / "database_nifti" / patient
    folder.mkdir(parents=True)
    shapes = {}
    for name, source in pictures.items():
        array, spacing = _read(source)
        array = _labels(array, source) if name.endswith("_gt") else _greys(array)
        shapes[name] = array.shape
        spacing = (1.0, 1.0) if np.isnan(spacing).any() else spacing
        nifti = nib.Nifti1Image(array.T, np.diag([-spacing[0], -spacing[1], 1, 1]))
        packed = gzip.compress(nifti.to_bytes(), compresslevel=3, mtime=0)
        (folder / f"{patient}_{name}.nii.gz").write_bytes(packed)
    for name, shape in shapes.items():
        if shape != shapes.get(f"{name}_gt", shape):
            raise DiffEchoError(
                f"{_place(pictures[name])}: shape {shape}, its label map {shapes[f'{name}_gt']}; take "
                "both from the same release"
            )
    if isinstance(source, Path):
        for cfg in source.parent.glob("Info_*.cfg"):
            shutil.copyfile(cfg, folder / cfg.name)


def _read(source):
    """A picture (H, W) or sequence (T, H, W), rows = depth, and (lateral, depth) spacing in mm or NaN."""
    spacing = (np.nan, np.nan)
    try:
        if not isinstance(source, Path):
            dataset, index = source
            array = dataset[index]
        elif source.suffix == ".mhd":
            import SimpleITK

            image = SimpleITK.ReadImage(str(source))
            array, spacing = SimpleITK.GetArrayFromImage(image), image.GetSpacing()[:2]
        else:
            with Image.open(source) as image:
                if image.mode not in ("L", "LA", "RGB", "RGBA"):
                    raise ValueError(f"mode {image.mode}, not 8-bit grey")
                array = np.asarray(image.convert("L"))
    except ImportError:
        raise DiffEchoError(
            f"{source}: reading mhd needs SimpleITK; pip install SimpleITK"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        # What SimpleITK says (RuntimeError) is many lines, the last of them often wrong.
        damage = "header or pixel file missing, damaged or too short"
        reason = damage if isinstance(error, RuntimeError) else error
        raise DiffEchoError(
            f"{_place(source)}: unreadable ({reason}); copy or write it again"
        ) from None
    array = np.squeeze(array)
    if array.ndim not in (2, 3) or not np.isfinite(array).all():
        raise DiffEchoError(
            f"{_place(source)}: shape {array.shape}, or values that are not finite; copy it again"
        )
    return array, spacing


def _greys(array):
    if array.dtype.kind == "f" and array.max() <= 1:
        array = array * 255
    return array if array.dtype == np.uint8 else array.astype(np.float32)


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
    if isinstance(source, Path):
        return source
    dataset, index = source
    return f"{dataset.file.filename}: {dataset.name[1:]}[{index}]"


def _write_lists(release, folder):
    """The source's own `subgroup*.txt` lists, or those that its folders or order imply."""
    folder.mkdir()
    found = [] if release.path.is_file() else release.path.rglob("*.txt")
    lists = {p.name.lower(): p.read_text() for p in found if p.name.lower().startswith("subgroup")}
    if not any(name.startswith("subgroup_") for name in lists):
        for split in set(release.splits.values()) & set(camus.SPLITS):
            names = [patient for patient, its in release.splits.items() if its == split]
            lists[f"subgroup_{split}.txt"] = "".join(f"{name}\n" for name in names)
    for name, text in lists.items():
        (folder / name).write_text(text)
