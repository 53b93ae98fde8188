"""A table of bad inputs: each ends with status 1, the file's name and a remedy, no traceback, nothing written.

And beside each kind its members that do work: they give the very pictures of the folder they were made from.
"""

import gzip
import json
import re
import shutil
from typing import get_args

import h5py
import nibabel as nib
import numpy as np
import pytest
from conftest import array as read
from conftest import assert_same_pictures, pictures
from PIL import Image

from diffecho_utils import (
    DiffEchoError,
    __main__,
    anatomy,
    assets,
    camus,
    checks,
    data,
    profiles,
    prompts,
    releases,
    training,
)
from diffecho_utils.__main__ import main

TRAIN = "train autoencoder --profile smoke --steps 1 1 --data {root} --out {out}"
COMMANDS = {
    "check": "check {root}",
    "json": "check {root} --json",
    "convert": "convert {root} {out}",
    "prompts": "prompts {root} {out}",
    "train": TRAIN,
    "all": f"{TRAIN} --split all",
}
OFFICIAL = np.diag([-0.308, -0.308, 1, 1])
PLACEHOLDER = np.diag([0.308, 0.308, 1, 1])


@pytest.fixture(scope="module")
def source(filmed_root, tmp_path_factory):
    """The phantom of four patients, 8-bit."""
    root = shutil.copytree(filmed_root, tmp_path_factory.mktemp("source") / "phantom")
    rewrite(frames(root), lambda a: a.astype(np.uint8))
    return root


@pytest.fixture
def root(source, tmp_path, monkeypatch):
    """A copy of it to damage."""
    (tmp_path / "workspace").mkdir()
    monkeypatch.setattr(assets, "workspace", lambda: tmp_path / "workspace")
    return shutil.copytree(source, tmp_path / "set")


def frames(root):
    return sorted(root.rglob("*_E[DS].nii.gz"))


def maps(root):
    return sorted(root.rglob("*_E[DS]_gt.nii.gz"))


def files(root):
    return [*frames(root), *maps(root)]


def pair(root):
    """A frame and its label map."""
    return [frames(root)[4], maps(root)[4]]


def sequences(root):
    return sorted(root.rglob("*_half_sequence.nii.gz"))


def save(path, array, affine=OFFICIAL):
    nib.Nifti1Image(np.ascontiguousarray(array), affine).to_filename(path)


def rewrite(paths, change=np.asarray, affine=OFFICIAL):
    """Write the files anew, changed; returns the first."""
    for path in paths:
        save(path, change(read(path)), affine)
    return paths[0]


def canonical(paths):
    """As nibabel turns an image of one slice."""
    for path in paths:
        array = read(path)
        image = nib.Nifti1Image(array.reshape(*array.shape[:2], -1), OFFICIAL)
        nib.as_closest_canonical(image).to_filename(path)


# --- what is done to arrays -----------------------------------------------------------------------


def standardised(array):
    return ((array - array.mean()) / array.std()).astype(np.float32)


def scaled(factor, offset=0.0, kind=np.float32):
    def change(array):
        array = array * np.float32(factor) + np.float32(offset)
        return (array.round() if issubclass(kind, np.integer) else array).astype(kind)

    return change


def above(level, kind):
    return lambda array: (array > level).astype(kind)


def every_other(factor):
    return lambda array, index: array * np.float32(factor) if index % 2 else array


def hole(array):
    array = array.astype(np.float32)
    array[3, 3] = np.nan
    return array


def coloured(array):
    return np.stack([array] * 3, -1).view(np.dtype([(c, np.uint8) for c in "RGB"]))[..., 0]


def turned(array):
    return np.rot90(array, 2)


def exchanged(array):
    return array.swapaxes(0, 1)


def relabel(*order):
    """Label maps in which 1, 2, 3 have these numbers."""
    return lambda array: np.array([0, *order], np.uint8)[array]


# --- what is done to a set, and where it is then, if elsewhere -----------------------------------


def later(damage):
    """The function without its first argument, the root: damage(root, 1) is later(damage)(1)(root)."""
    return lambda *given, **named: lambda root: damage(root, *given, **named)


@later
def several(root, *steps):
    return [step(root) for step in steps][-1]


@later
def on(root, pick, change=np.asarray, part=slice(None), affine=OFFICIAL):
    """Some of the files are written anew."""
    rewrite(pick(root)[part], change, affine)


@later
def fields(root, part=slice(None), pattern="**/*_E[DS].nii.gz", **changed):
    """Fields of the frames' headers are written as they are."""
    for path in sorted(root.glob(pattern))[part]:
        raw = gzip.decompress(path.read_bytes())
        header = nib.Nifti1Header(raw[:348], check=False)
        for name, value in changed.items():
            header[name] = value
        path.write_bytes(gzip.compress(header.binaryblock + raw[348:], 1))


@later
def spaced(root, value, **which):
    fields(pixdim=[1, value, 0.308, 1, 1, 1, 1, 1], **which)(root)


@later
def without(root, pattern):
    """Files or folders are lost."""
    for path in list(root.glob(pattern)):
        remove = shutil.rmtree if path.is_dir() else type(path).unlink
        remove(path)


@later
def holding(root, name, content):
    """A file holds something else."""
    (root / name).write_bytes(content)


@later
def unzipped(root, part=slice(None)):
    for path in sorted(root.rglob("*.nii.gz"))[part]:
        nib.load(path).to_filename(path.with_suffix(""))
        path.unlink()


@later
def nnunet(root, images="imagesTr", labels="labelsTr", channel="_0000", end=".nii.gz"):
    """nnU-Net's layout, or a flat one; lists, cfg files and our dataset.json are lost."""
    for folder, paths, behind in ((images, frames(root), channel), (labels, maps(root), "")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for path in paths:
            name = path.name.removesuffix(".nii.gz").removesuffix("_gt") + behind + end
            nib.load(path).to_filename(root / folder / name)
    without("database_*")(root)
    (root / "dataset.json").write_text('{"channel_names": {"0": "US"}, "labels": {}}')


@later
def pngs(root, split="Train", change=np.asarray):
    """CAMUS's names, pictures as PNG under a split's folder."""
    folder = root.parent / "pngs" / split
    folder.mkdir(parents=True)
    for (patient, view, phase), (image, mask) in pictures(root).items():
        stem = f"{folder}/{patient}_{view}_{phase}"
        Image.fromarray(change(image.astype(np.uint8))).save(f"{stem}.png")
        Image.fromarray(mask).save(f"{stem}_gt.png")
    return folder.parent


@later
def pngs_and_changed_copies(root):
    folder = pngs()(root)
    twin = shutil.copytree(folder / "Train", folder / "all_views" / "Train")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(sorted(twin.glob("*_gt.png"))[0])
    return folder


@later
def hdf5(root, change=lambda array, index: array):
    path, table = root.parent / "set.hdf5", camus.read_table(root)
    with h5py.File(path, "w") as file:
        for view, phase in camus.CLASSES:
            rows = camus.select(table, view=view, phase=phase).itertuples()
            pairs = [[a[:60, :60] for a in camus.read_frame(row)] for row in rows]
            images = np.stack([change(image, i) for i, (image, _) in enumerate(pairs)])
            masks = np.stack([mask for _, mask in pairs])
            for kind, arrays in (("frames", images), ("masks", masks)):
                file[f"train {view.lower()} {phase} {kind}"] = arrays[..., None]
    return path


# --- the table: what is broken, the file that is named, words that must appear, commands (check) ------

GREY, SCALE, SIDES = "neither 0 to 255", "more than one scale", "left and right exchanged"
DOWN, TURNED = "upside down.*16 of 16 frames", "rotated by 90 degrees"
ROTATED = f"{TURNED}, as|{TURNED}.*16 of 16"
ZIP, SPACING = "uncompressed; gzip it, or convert", "pixel size.*16 of 16 frames; write the right"
NOTE, SET, LIST = "dataset.json", "database_nifti", "database_split/subgroup_training.txt"
FRAME, MAP = "patient0001_2CH_ED.nii.gz", "patient0001_2CH_ED_gt.nii.gz"
PLACE, UNREADABLE = f"{SET}/patient0001/{FRAME}", "unreadable.*copy or download it again"
FIFTH = "patient0002_2CH_ED_gt.nii.gz"
FIRST, FEW, REST, HALF = slice(1), slice(3), slice(1, None), slice(8, None)
DEPTH, LATERAL = np.diag([-0.308, 0.308, 1, 1]), np.diag([0.308, -0.308, 1, 1])
NO_ATRIUM, NO_CAVITY = on(maps, relabel(1, 2, 0)), on(maps, relabel(0, 2, 3))
NO_WALL, EMPTY = on(maps, relabel(1, 0, 3), FEW), on(maps, relabel(0, 0, 0), FIRST)
of_two = several(lambda root: canonical(frames(root)), on(maps, turned, affine=PLACEHOLDER))
nnunet_spaced = several(nnunet(), spaced(0, part=FIRST, pattern="imagesTr/*"))
thousands = several(on(frames, standardised), on(frames, scaled(1000, kind=np.int16)))
one_black = on(frames, above(255, np.uint8), slice(5, 6))
one_up_to_1 = several(on(frames, scaled(1), REST), on(frames, scaled(1 / 255), FIRST))
half_signed = several(on(frames, scaled(1 / 255)), on(frames, scaled(2, -1), HALF))
torn, utf_16 = holding(NOTE, b'{"world": "phan'), holding(LIST, "patient".encode("utf-16"))
BAD = {
    # grey values
    "z-scored": (on(frames, standardised), SET, GREY, "check", "train"),
    "z-scored by 1000": (thousands, SET, GREY),
    "percents": (on(frames, scaled(100 / 255)), SET, GREY),
    "around zero": (on(frames, scaled(1 / 255, -0.5)), SET, GREY),
    "signed bytes": (on(frames, lambda a: a.astype(np.int8)), SET, GREY, "prompts"),
    "cut to bits": (on(frames, above(100, np.int16)), SET, GREY),
    "black floats": (on(frames, scaled(0)), FRAME, "one grey value all over"),
    "black bytes": (on(frames, above(250, np.uint8)), FRAME, "black, .*16 of 16 frames"),
    "one black": (one_black, "patient0002_2CH_ES.nii.gz", "black, or of one grey.*1 of 16"),
    "one up to 1": (one_up_to_1, FRAME, SCALE, "check", "train"),
    "half from -1 to 1": (half_signed, FRAME, SCALE),
    "half wide": (on(frames, scaled(16, kind=np.int16), HALF), FRAME, SCALE, "train"),
    "not a number": (on(frames, hole, FIRST), FRAME, "NaN or infinite"),
    "colours": (on(frames, coloured, FIRST), FRAME, "colours"),
    "broken type": (fields(FIRST, datatype=9999), FRAME, "unreadable", "train"),
    # no NIfTI
    "empty file": (holding(PLACE, b""), FRAME, UNREADABLE, "train"),
    "no gzip": (holding(PLACE, b"no gzip"), FRAME, UNREADABLE, "train"),
    "header only": (holding(PLACE, gzip.compress(bytes(348))), FRAME, UNREADABLE, "train"),
    "one byte": (holding(PLACE, gzip.compress(b"x")), FRAME, UNREADABLE, "train"),
    # orientation
    "upside down": (on(files, np.fliplr), MAP, DOWN),
    "turned round": (on(files, turned, affine=PLACEHOLDER), MAP, DOWN),
    "one upside down": (on(pair, np.fliplr), FIFTH, "upside down.*1 of 16 frames"),
    "affine that lies": (on(files, affine=DEPTH), MAP, "upside down.*write the affine"),
    "no atrium to tell by": (several(NO_ATRIUM, on(files, np.fliplr)), MAP, r"upside.*1\d of 16"),
    "one affine of two": (of_two, MAP, "only one of the affines"),
    "rotated": (on(files, np.rot90), SET, ROTATED),
    "rotated back": (on(files, lambda a: np.rot90(a, 3)), SET, ROTATED),
    "one rotated": (on(pair, np.rot90), FIFTH, f"{TURNED}.*1 of 16"),
    "mirrored": (on(files, np.flipud), MAP, SIDES),
    "mirrored by its affine": (on(files, affine=LATERAL), MAP, SIDES),
    # labels
    "1 and 3": (on(maps, relabel(3, 2, 1)), MAP, "LV cavity 3, myocardium 2, LA 1.*16 of 16"),
    "1 and 2": (on(maps, relabel(2, 1, 3)), MAP, "exchanged .LV cavity 2, myocardium 1, LA 3"),
    "1, 2 and 3": (on(maps, relabel(3, 1, 2), FEW), MAP, "cavity 3, myocardium 1, LA 2.*3 of 16"),
    "1 and 2, no 3": (on(maps, relabel(2, 1, 0)), MAP, "labels exchanged"),
    "empty map": (EMPTY, MAP, "empty label map.*1 of 16"),
    "no cavity": (NO_CAVITY, MAP, "without LV cavity.*16 of 16"),
    "no wall": (NO_WALL, MAP, "without myocardium.*3 of 16"),
    "stretched levels": (on(maps, lambda a: a * 85, FIRST), MAP, r"labels \[85"),
    # layouts
    "pixel size 0": (spaced(0), FRAME, SPACING, "check", "train"),
    "pixel size -0.3": (spaced(-0.308), FRAME, SPACING),
    "pixel size NaN": (spaced(np.nan), FRAME, SPACING),
    "pixel size 308": (spaced(308), FRAME, SPACING),
    "uncompressed": (unzipped(), FRAME.removesuffix(".gz"), ZIP),
    "one uncompressed": (unzipped(FIRST), FRAME.removesuffix(".gz"), ZIP, "json"),
    "nnU-Net": (nnunet(), "", "convert SOURCE DEST", "check", "json"),
    "flat": (nnunet("train", "train/labels", "", ".nii"), "", "convert SOURCE DEST"),
    "nnU-Net, bare": (
        several(nnunet(), without("labelsTr")),
        "",
        "16 frames, none with",
        "convert",
    ),
    "nnU-Net, z": (several(on(frames, standardised), nnunet()), "imagesTr", GREY, "convert", "all"),
    "nnU-Net, pixel size": (nnunet_spaced, "ED_0000.nii.gz", "pixel size 0 x 0.308", "convert"),
    "PNGs twice": (several(pngs(), pngs("Test")), "", "under testing and training", "convert"),
    "PNGs, black": (pngs(change=above(250, np.uint8)), "Train", GREY, "convert"),
    "PNGs, changed copies": (
        pngs_and_changed_copies(),
        "ED_gt.png",
        "leave one of the two",
        "convert",
    ),
    "HDF5, z-scored": (hdf5(lambda a, _: standardised(a)), "", GREY, "convert"),
    "HDF5, two scales": (hdf5(every_other(1 / 255)), "", r"\[1\]: .*one scale", "convert"),
    "HDF5, half wide": (hdf5(every_other(16)), "", SCALE, "convert"),
    "torn JSON": (torn, NOTE, "no JSON.*restore it, or move", "check", "json", "train"),
    "list in UTF-16": (utf_16, LIST, "no plain text; write it anew", "train"),
    "no lists": (without(LIST.split("/")[0]), "", "'none': 4.*--split all.*training.txt", "train"),
    "other lists": (without("*/*_training.txt"), LIST, "no frame with split=training", "train"),
    "official already": (lambda root: None, "", "official layout already", "convert"),
    "nothing": (without(SET), "", "in none of its forms", "convert", "all"),
}
ROWS = [
    pytest.param(damage, named, words, command, id=f"{name}-{command}")
    for name, (damage, named, words, *commands) in BAD.items()
    for command in commands or ["check"]
]


def run(line, **places):
    return main([word.format(**places) for word in line.split()])


@pytest.mark.parametrize(("damage", "named", "words", "command"), ROWS)
def test_bad_input_is_named_with_a_remedy_and_nothing_is_written(
    damage, named, words, command, root, tmp_path, capfd
):
    given = damage(root) or root
    before = sorted(tmp_path.rglob("*"))
    assert run(COMMANDS[command], root=given, out=tmp_path / "out") == 1
    printed = "".join(capfd.readouterr())
    assert re.search(rf"{re.escape(str(given))}\S*{re.escape(named)}", printed), printed
    assert re.search(words, printed, re.S), printed
    assert re.search(r"; \w", printed), f"no remedy: {printed}"
    assert "Traceback" not in printed and "pixdim" not in printed
    left = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert all(path.parent == tmp_path / "workspace" for path in left if path.is_dir())
    assert not [path for path in left if path.is_file()]
    if command == "json":
        json.loads(printed)


# --- what works -----------------------------------------------------------------------------------


SCALES = {  # what is done to the bytes of the frames, the black and white to find, and a tolerance
    "bytes": (np.asarray, 0, 255, 0.01),
    "float 0-255": (scaled(1), 0, 255, 0.01),
    "float64 0-255": (scaled(1, kind=np.float64), 0, 255, 0.01),
    "overshot 0-255": (lambda a: a - 4.0 * (a == 0) + 6.0 * (a == 255), 0, 255, 0.01),
    "0-1": (scaled(1 / 255), 0, 1, 0.01),
    "-1 to 1": (scaled(2 / 255, -1), -1, 1, 0.01),
    "10 bits": (scaled(1023 / 255, kind=np.int16), 0, 1023, 0.2),
    "12 bits": (scaled(4095 / 255, kind=np.uint16), 0, 4095, 0.05),
    "15 bits": (scaled(32767 / 255, kind=np.int16), 0, 32767, 0.01),
    "16 bits": (scaled(65535 / 255, kind=np.uint16), 0, 65535, 0.01),
    "float of 12 bits": (lambda a: scaled(4095 / 255)(a).round(), 0, 4095, 0.05),
}


@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_is_told_from_the_set_and_gives_the_same_pictures(scale, source, root):
    change, black, white, tolerance = SCALES[scale]
    rewrite(frames(root), change)
    dark = frames(root)[0]  # says nothing of its own scale: it is read on the set's
    save(dark, change(read(source / dark.relative_to(root)) // 2))
    table = camus.read_table(root)
    assert set(zip(table["black"], table["white"], strict=True)) == {(black, white)}
    expected = pictures(source)
    first = (table["patient"][0], table["view"][0], table["phase"][0])
    expected[first] = (expected[first][0] // 2, expected[first][1])
    assert_same_pictures(root, expected, tolerance)
    problems, notes = checks.examine(root)
    assert problems == [] and f"{black} is read as black, {white} as white" in notes[0]


def test_a_slope_in_an_8_bit_header_is_a_scale_too(source, root):
    for path in frames(root):
        image = nib.Nifti1Image(read(path), OFFICIAL)
        image.header.set_slope_inter(1 / 255, 0)
        path.write_bytes(b"")
        nib.save(image, path)
    assert (camus.read_table(root)["white"] == 1).all()
    assert_same_pictures(root, pictures(source), 0.01)


def test_overshooting_pictures_are_as_the_others(source, root):
    """Half the frames overshoot 1: all are read alike."""

    def overshot(array):
        array = scaled(1 / 255)(array)
        array[0, :2] = -0.01, 1.02
        return array

    rewrite(frames(root)[::2], overshot)
    rewrite(frames(root)[1::2], scaled(1 / 255))
    expected = {key: (image.copy(), mask) for key, (image, mask) in pictures(source).items()}
    for key in list(expected)[::2]:
        expected[key][0][:2, 0] = 0, 255
    assert_same_pictures(root, expected, 0.01)


def test_many_frames_are_read_once_for_a_scale_that_each_row_carries(root, monkeypatch):
    rewrite(frames(root), scaled(1 / 255))
    dark = rewrite(frames(root)[:1], lambda a: a / 4)
    monkeypatch.setattr(camus, "_FEW", 3)
    first = camus.read_table(root)
    few = first[first["image"] == dark]
    assert camus.read_frame(few.iloc[0])[0].max() < 70
    read_again = []
    monkeypatch.setattr(camus, "_file_range", lambda path: read_again.append(path) or [False, 0, 1])
    assert camus.read_table(root).equals(first) and not read_again
    rewrite(frames(root)[:1], scaled(1))
    camus.read_table(root)
    assert len(read_again) == 16


def relaid(change, affine=OFFICIAL):
    return lambda paths: rewrite(paths, change, affine)


AXES = np.array([[0, -0.308, 0, 0], [-0.308, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])  # exchanged
LAID = {
    "depth": relaid(np.fliplr, DEPTH),
    "lateral": relaid(np.flipud, LATERAL),
    "canonical": canonical,
    "canonical label maps": lambda paths: canonical([p for p in paths if "_gt" in p.name]),
    "placeholder": relaid(np.asarray, PLACEHOLDER),
    "unit": relaid(np.asarray, np.eye(4)),
    "none": relaid(np.asarray, None),
    "exchanged": relaid(exchanged, AXES),
    "transposed": relaid(exchanged),
}


@pytest.mark.parametrize("laid", LAID)
def test_the_affine_is_honoured(laid, source, root):
    LAID[laid](files(root))
    assert_same_pictures(root, pictures(source))
    assert checks.check(root) == []


@pytest.mark.parametrize("plane", ([[0, -0.25], [-0.5, 0]], [[-0.5, 0], [0, -0.25]]))
def test_exchanged_axes_have_exchanged_spacing(plane, root):
    """Those that the affine says, and those that only the chambers' places tell."""
    affine = np.eye(4)
    affine[:2, :2] = plane
    rewrite(files(root), exchanged, affine)
    table = camus.read_table(root)
    assert (table["transposed"] == bool(plane[0][0])).all()
    assert np.allclose(table["lateral_mm"], 0.25) and np.allclose(table["depth_mm"], 0.5)


@pytest.mark.parametrize(("damage", "unknown"), [(EMPTY, 1), (NO_CAVITY, 4), (NO_WALL, 0)])
def test_prompts_leave_out_what_a_label_map_does_not_say(damage, unknown, root, tmp_path):
    damage(root)
    for cfg in root.rglob("Info_*.cfg"):
        cfg.unlink()
    assert run(COMMANDS["prompts"], root=root, out=tmp_path / "prompts.csv") == 0
    frames = data.load_frames(camus.read_table(root), data.Geometry(64))
    known = prompts.facts(frames.masks, frames.table).groupby("patient")["ef"].first()
    assert known.isna().sum() == unknown
    measured = anatomy.patients_ef(frames.masks, frames.table)
    assert len(measured) == 4 and measured["ef"].isna().sum() == known.isna().sum()


def test_a_missing_atrium_is_a_note_and_no_small_one(root):
    rewrite(maps(root), relabel(1, 2, 0))
    problems, notes = checks.examine(root)
    assert problems == [] and "no LA (label 3)" in notes[-1] and "16 of 16" in notes[-1]
    frames = data.load_frames(camus.read_table(root), data.Geometry(64))
    facts = prompts.facts(frames.masks, frames.table)
    assert facts["la_size"].isna().all() and facts["ef"].notna().all()


def test_one_view_alone_says_what_works(root):
    without("**/*_2CH_*")(root)
    problems, notes = checks.examine(root)
    assert problems == [] and "no frame of 2CH-ED, 2CH-ES; " in notes[1]
    assert set(camus.read_table(root)["view"]) == {"4CH"}


def test_a_foreign_description_is_let_be(source, root):
    for content in ('{"channel_names": {"0": "US"}}', "[1, 2]", '{"world": 5}'):
        (root / "dataset.json").write_text(content)
        assert camus.world(root) == "camus" and checks.check(root) == []
    assert camus.world(source) == "phantom"


def test_all_patients_listed_or_not(root):
    (root / "database_split" / "subgroup_training.txt").unlink()
    table = camus.read_table(root)
    assert camus.select(table, "all")["patient"].nunique() == 4
    assert any(
        "2 patients in no list; use them with --split all" in n for n in checks.examine(root)[1]
    )
    with pytest.raises(DiffEchoError, match="'none': 2"):
        camus.select(table, "training")


def test_nibabel_is_silent_about_headers_that_do_not_matter(root, capfd):
    fields(pixdim=[0, 0.308, 0.308, 0, 0, 0, 0, 0])(root)
    assert checks.check(root) == [] and capfd.readouterr() == ("", "")


def test_hdf5_files_are_closed(root):
    path = hdf5()(root)
    releases.convert(path, root.parent / "converted")
    with h5py.File(path, "a") as file:  # HDF5 locks a file that is open elsewhere
        assert len(file) == 8


NUMBERS = {
    "phantom {out}": "--patients 0|--patients 2.5|--seed -1|--seed 99999999999",
    "download {out}": "--patients 0",
    "train sdm --data {out} --out {out}": "--steps 0|--steps 5 0|--batch 0|--accumulation 0|"
    "--learning-rate nan|--learning-rate 0|--ema 1|--snr-gamma -5|--minutes 0|--minutes inf|"
    "--latent-channels 0|--views 0|--patients 0|--seed -1",
    "sample sdm --checkpoint {out} --out {out}": "--n 0|--steps 0|--steps 1001|--batch 0|"
    "--patients 0|--seed -1|--guidance nan|--guidance inf|--guidance -1|--guidance-interval -1 5",
    "downstream segmentation --data {out}": "--share 0|--share nan|--seeds 0|--steps 0|--patients 0",
}


@pytest.mark.parametrize(
    "line", [f"{command} {o}" for command, options in NUMBERS.items() for o in options.split("|")]
)
def test_numbers_are_checked_before_anything_is_read_or_written(line, tmp_path, capsys):
    assert run(line, out=tmp_path / "out") == 2
    option = re.findall("--[a-z-]+", line)[-1]
    said = capsys.readouterr().err
    assert re.search(
        f"'{option}': .*(greater|less) than or equal|'{option}'.*valid integer", said
    ), said
    assert not any(tmp_path.iterdir())


def test_places_that_cannot_be_written_are_named(source, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("not a folder")
    for command in (
        "phantom /proc/nowhere/phantom --patients 1",
        "phantom {file}/phantom --patients 1",
        "convert {source}/none {file}/set",
        "prompts {source} {folder}/missing/prompts.csv",
        "prompts {source} {folder}",
    ):
        assert run(command, source=source, file=file, folder=tmp_path) == 1
        assert re.match(r"error: \S*/\S+: \w.*; \w+", capsys.readouterr().err), command
    assert file.read_text() == "not a folder" and list(tmp_path.iterdir()) == [file]


def test_a_run_of_other_settings_is_refused_until_it_may_begin_again(root, tmp_path, capsys):
    """By the command line; what else makes another run, and damaged states, are in test_training."""
    train = "train segmenter --profile smoke --split all --patients 2 --data {root} --out {out}"
    places = {"root": root, "out": tmp_path / "run"}
    assert run(train, **places) == 0
    assert run(f"{train} --seed 1 --stretch --batch 2", **places) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path}/run/state/segmenter.safetensors: holds" in said and "--restart" in said
    for changed in ("seed", "stretched", "batch"):
        assert re.search(rf"another .*{changed} \(", said)
    assert run(f"{train} --seed 1 --restart", **places) == 0


def test_the_command_line_knows_the_words_of_the_package():
    assert get_args(__main__.SPLIT) == camus.SPLITS
    assert set(get_args(__main__.TEMPLATE)) == set(prompts.TEMPLATES)
    assert set(get_args(__main__.MODEL)) == set(training.MODELS)


def test_usage_is_plain_text_of_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    commands = re.findall("^  ([a-z]+)  ", capsys.readouterr().out, re.M)
    assert len(commands) == 9
    for words in (["--help"], *([command, "--help"] for command in commands)):
        assert main(words) == 0
        said = capsys.readouterr().out
        assert max(map(len, said.splitlines())) <= 80 and said.isascii() and "\x1b" not in said
    for words in ([], ["nonsense"], ["train"], ["train", "sdm", "--data", "x", "--out", "y", "z"]):
        assert main(words) == 2
        assert "--help' for help" in capsys.readouterr().err


def test_an_option_of_several_values_and_an_interruption(root, tmp_path, monkeypatch, capsys):
    """One number of steps a stage, as shipped checkpoints record it; Ctrl-C is said and is no fault."""
    given = []

    def train(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(
        profiles, "adapt", lambda profile, model, **how: given.append(how["steps"]) or profile
    )
    line = COMMANDS["all"].replace("--steps 1 1", "{steps}")
    for steps in ("--steps 9 5", "--steps 9 --steps 5"):
        assert run(line.replace("{steps}", steps), root=root, out=tmp_path / "out") == 130
        assert capsys.readouterr().err.endswith("interrupted\n")
    assert given == [[9, 5]] * 2
