"""A table of bad inputs: each ends with status 1, the file's name and a remedy, no traceback, nothing written.

And beside each kind its members that do work: they give the very pictures of the folder they were made from.
"""

import gzip
import json
import re
import shutil

import h5py
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from diffecho_utils import (
    DiffEchoError,
    anatomy,
    assets,
    camus,
    checks,
    data,
    phantom,
    prompts,
    releases,
)
from diffecho_utils.__main__ import main

OFFICIAL = np.diag([-0.308, -0.308, 1, 1])
COMMANDS = {
    "check": ["check", "{root}"],
    "json": ["check", "{root}", "--json"],
    "convert": ["convert", "{root}", "{out}"],
    "prompts": ["prompts", "{root}", "{out}"],
    "train": "train autoencoder --profile smoke --steps 1 1 --data {root} --out {out}".split(),
    "all": "train autoencoder --profile smoke --steps 1 1 --split all --data {root} --out {out}".split(),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A phantom of four patients, 8-bit, with short half sequences."""
    root = tmp_path_factory.mktemp("source") / "phantom"
    phantom.write(root, patients=4, seed=3, side=64, processes=1)
    rewrite(frames(root), lambda a: a.astype(np.uint8))
    for path in frames(root):
        if "_ED" in path.name:
            array = read(path)
            film = np.stack([np.roll(array, shift) for shift in range(3)], -1)
            save(path.with_name(path.name.replace("ED", "half_sequence")), film)
    return root


@pytest.fixture
def root(source, tmp_path, monkeypatch):
    """A copy of it to damage."""
    (tmp_path / "workspace").mkdir()
    monkeypatch.setattr(assets, "workspace", lambda: tmp_path / "workspace")
    return shutil.copytree(source, tmp_path / "set")


def frames(root):
    return sorted(path for path in root.rglob("*.nii.gz") if re.search("_E[DS].nii.gz$", path.name))


def maps(root):
    return sorted(root.rglob("*_E?_gt.nii.gz"))


def read(path):
    return np.asanyarray(nib.load(path).dataobj)


def save(path, array, affine=OFFICIAL):
    nib.Nifti1Image(np.ascontiguousarray(array), affine).to_filename(path)


def rewrite(paths, change=lambda array: array, affine=OFFICIAL):
    """Write the files anew, changed; returns the first."""
    for path in paths:
        save(path, change(read(path)), affine)
    return paths[0]


def header(path, **fields):
    """Write fields into a file's header as they are."""
    raw = gzip.decompress(path.read_bytes())
    changed = nib.Nifti1Header(raw[:348], check=False)
    for name, value in fields.items():
        changed[name] = value
    path.write_bytes(gzip.compress(changed.binaryblock + raw[348:], 1))


def relabel(*order):
    """Label maps in which 1, 2, 3 have these numbers."""
    return lambda array: np.array([0, *order], np.uint8)[array]


# --- grey values ----------------------------------------------------------------------------------


def standardised(array):
    return ((array - array.mean()) / array.std()).astype(np.float32)


def floats(factor, offset=0.0):
    return lambda array: (array * np.float32(factor) + np.float32(offset)).astype(np.float32)


def z_scored(root):
    rewrite(frames(root), standardised)
    return None, "neither 0 to 255"


def z_scored_thousands(root):
    rewrite(frames(root), lambda a: (1000 * standardised(a)).astype(np.int16))
    return None, "neither 0 to 255"


def percents(root):
    rewrite(frames(root), floats(100 / 255))
    return None, "neither 0 to 255"


def around_zero(root):
    rewrite(frames(root), floats(1 / 255, -0.5))
    return None, "neither 0 to 255"


def signed_bytes(root):
    rewrite(frames(root), lambda a: a.astype(np.int8))
    return None, "neither 0 to 255"


def cut_to_bits(root):
    rewrite(frames(root), lambda a: (a > 100).astype(np.int16))
    return None, "neither 0 to 255"


def black_floats(root):
    return rewrite(frames(root), lambda a: np.zeros_like(a, np.float32)), "one grey value all over"


def black_bytes(root):
    return rewrite(frames(root), lambda a: (a > 250).astype(np.uint8)), "black, .*16 of 16 frames"


def one_black_frame(root):
    return rewrite(frames(root)[5:6], lambda a: a * 0), "black, or of one grey value.*1 of 16"


def half_to_one(root):
    rewrite(frames(root)[1:], floats(1))
    return rewrite(frames(root)[:1], floats(1 / 255)), "more than one scale"


def half_signed(root):
    rewrite(frames(root)[:8], floats(1 / 255))
    rewrite(frames(root)[8:], floats(2 / 255, -1))
    return frames(root)[0], "more than one scale"


def half_wide(root):
    rewrite(frames(root)[8:], lambda a: a.astype(np.int16) * 16)
    return frames(root)[0], "more than one scale"


def not_a_number(root):
    def hole(array):
        array = array.astype(np.float32)
        array[3, 3] = np.nan
        return array

    return rewrite(frames(root)[:1], hole), "NaN or infinite"


def colours(root):
    kind = np.dtype([(c, np.uint8) for c in "RGB"])
    rewrite(frames(root)[:1], lambda a: np.stack([a] * 3, -1).view(kind)[..., 0])
    return frames(root)[0], "colours"


def broken_type(root):
    header(frames(root)[0], datatype=9999)
    return frames(root)[0], "unreadable"


GREYS = [
    (z_scored, "check"),
    (z_scored, "train"),
    (z_scored_thousands, "check"),
    (percents, "check"),
    (around_zero, "check"),
    (signed_bytes, "prompts"),
    (cut_to_bits, "check"),
    (black_floats, "check"),
    (black_bytes, "check"),
    (one_black_frame, "check"),
    (half_to_one, "check"),
    (half_to_one, "train"),
    (half_signed, "check"),
    (half_wide, "train"),
    (not_a_number, "check"),
    (colours, "check"),
    (broken_type, "train"),
]


# --- orientation and labels -----------------------------------------------------------------------

PLACEHOLDER = np.diag([0.308, 0.308, 1, 1])


def files(root):
    return [*frames(root), *maps(root)]


def upside_down(root):
    rewrite(files(root), lambda a: a[:, ::-1])
    return maps(root)[0], "upside down.*16 of 16 frames"


def turned_around(root):
    rewrite(files(root), lambda a: a[::-1, ::-1], PLACEHOLDER)
    return maps(root)[0], "upside down.*16 of 16 frames"


def one_upside_down(root):
    rewrite([frames(root)[4], maps(root)[4]], lambda a: a[:, ::-1])
    return maps(root)[4], "upside down.*1 of 16 frames"


def affine_that_lies(root):
    rewrite(files(root), affine=np.diag([-0.308, 0.308, 1, 1]))
    return maps(root)[0], "upside down.*write the affine"


def upside_down_without_atrium(root):
    rewrite(maps(root), relabel(1, 2, 0))
    return upside_down(root)[0], r"upside down.*1\d of 16 frames"


def one_affine_of_two(root):
    canonical(frames(root))
    rewrite(maps(root), lambda a: a[::-1, ::-1], PLACEHOLDER)
    return maps(root)[0], "only one of the affines"


def rotated(root):
    rewrite(files(root), np.rot90)
    return None, "rotated by 90 degrees, as|rotated by 90 degrees.*16 of 16"


def rotated_back(root):
    rewrite(files(root), lambda a: np.rot90(a, 3))
    return None, "rotated by 90 degrees, as|rotated by 90 degrees.*16 of 16"


def one_rotated(root):
    rewrite([frames(root)[4], maps(root)[4]], np.rot90)
    return maps(root)[4], "rotated by 90 degrees.*1 of 16"


def mirrored(root):
    rewrite(files(root), lambda a: a[::-1])
    return maps(root)[0], "left and right exchanged"


def mirrored_by_affine(root):
    rewrite(files(root), affine=np.diag([0.308, -0.308, 1, 1]))
    return maps(root)[0], "left and right exchanged"


def cavity_and_atrium(root):
    rewrite(maps(root), relabel(3, 2, 1))
    return maps(root)[0], "exchanged .LV cavity 3, myocardium 2, LA 1.*16 of 16"


def cavity_and_wall(root):
    rewrite(maps(root), relabel(2, 1, 3))
    return maps(root)[0], "exchanged .LV cavity 2, myocardium 1, LA 3"


def all_labels(root):
    rewrite(maps(root)[3:5], relabel(3, 1, 2))
    return maps(root)[3], "exchanged .LV cavity 3, myocardium 1, LA 2.*2 of 16"


def exchanged_without_atrium(root):
    rewrite(maps(root), relabel(2, 1, 0))
    return maps(root)[0], "labels exchanged"


def empty_map(root):
    return rewrite(maps(root)[2:3], lambda a: a * 0), "empty label map.*1 of 16"


def no_cavity(root):
    return rewrite(maps(root), relabel(0, 2, 3)), "without LV cavity.*16 of 16"


def no_wall(root):
    return rewrite(maps(root)[1:4], relabel(1, 0, 3)), "without myocardium.*3 of 16"


def stretched_levels(root):
    return rewrite(maps(root)[:1], lambda a: a * 85), r"labels \[85"


PLACES = [
    upside_down,
    turned_around,
    one_upside_down,
    affine_that_lies,
    upside_down_without_atrium,
    one_affine_of_two,
    rotated,
    rotated_back,
    one_rotated,
    mirrored,
    mirrored_by_affine,
    cavity_and_atrium,
    cavity_and_wall,
    all_labels,
    exchanged_without_atrium,
    empty_map,
    no_cavity,
    no_wall,
    stretched_levels,
]


# --- layouts --------------------------------------------------------------------------------------


def pixel_size(value):
    def damage(root):
        for path in frames(root):
            header(path, pixdim=[1, value, 0.308, 1, 1, 1, 1, 1])
        return frames(root)[0], "pixel size.*16 of 16 frames; write the right one"

    damage.__name__ = f"pixel size {value}"
    return damage


def unzip(root):
    for path in root.rglob("*.nii.gz"):
        nib.load(path).to_filename(path.with_suffix(""))
        path.unlink()
    return root


def uncompressed(root):
    unzip(root)
    return frames_of(root, ".nii")[0], "uncompressed; gzip it, or convert"


def one_uncompressed(root):
    path = frames(root)[3]
    unzip(path.parent)
    return path.with_suffix(""), "uncompressed; gzip it, or convert"


def frames_of(root, end):
    return sorted(p for p in root.rglob(f"*{end}") if re.search(f"_E[DS]{end}$", p.name))


def nnunet(root, images="imagesTr", labels="labelsTr", channel="_0000", end=".nii.gz"):
    """The same files in nnU-Net's layout, or a flat one; lists, cfg files and our dataset.json are lost."""
    for folder, paths, behind in ((images, frames(root), channel), (labels, maps(root), "")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for path in paths:
            name = path.name.removesuffix(".nii.gz").removesuffix("_gt") + behind + end
            nib.load(path).to_filename(root / folder / name)
    for folder in ("database_nifti", "database_split"):
        shutil.rmtree(root / folder)
    (root / "dataset.json").write_text('{"channel_names": {"0": "US"}, "labels": {}}')
    return root


def nnunet_unconverted(root):
    return nnunet(root), "convert SOURCE DEST"


def flat_unconverted(root):
    return nnunet(root, "train", "train/labels", "", ".nii"), "convert SOURCE DEST"


def nnunet_without_labels(root):
    shutil.rmtree(nnunet(root) / "labelsTr")
    return root, "16 frames, none with its label map"


def nnunet_z_scored(root):
    rewrite(frames(root), standardised)
    nnunet(root)
    return root / "imagesTr", "neither 0 to 255"


def nnunet_pixel_size(root):
    header(frames(root)[0], pixdim=[1, 0, 0.308, 1, 1, 1, 1, 1])
    name = frames(root)[0].name.replace(".nii.gz", "_0000.nii.gz")
    nnunet(root)
    header(root / "imagesTr" / name, pixdim=[1, 0, 0.308, 1, 1, 1, 1, 1])
    return root / "imagesTr" / name, "pixel size 0 x 0.308"


def pngs(root, split="Train", level=1, change=lambda array: array):
    """CAMUS's names, pictures as PNG under a split's folder."""
    folder = root.parent / "pngs" / split
    folder.mkdir(parents=True)
    for row in camus.read_table(root).itertuples():
        image, mask = camus.read_frame(row)
        stem = f"{row.patient}_{row.view}_{row.phase}"
        Image.fromarray(change(image.astype(np.uint8))).save(folder / f"{stem}.png")
        Image.fromarray(mask * level).save(folder / f"{stem}_gt.png")
    return folder.parent


def pngs_twice(root):
    pngs(root, "Train"), pngs(root, "Test")
    return root.parent / "pngs", "is under testing and training folders"


def pngs_black(root):
    folder = pngs(root, change=lambda a: (a > 250).astype(np.uint8))
    return folder / "Train", "neither 0 to 255"


def pngs_changed_copies(root):
    folder = pngs(root, "Train")
    twin = shutil.copytree(folder / "Train", folder / "all_views" / "Train")
    path = sorted(twin.glob("*_gt.png"))[0]
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)
    return path, "leave one of the two"


def hdf5(root, change=lambda array, index: array):
    path = root.parent / "set.hdf5"
    table = camus.read_table(root)
    with h5py.File(path, "w") as file:
        for view, phase in camus.CLASSES:
            rows = camus.select(table, view=view, phase=phase).itertuples()
            pairs = [[a[:60, :60] for a in camus.read_frame(row)] for row in rows]
            images = np.stack([change(image, i) for i, (image, _) in enumerate(pairs)])
            for kind, arrays in (("frames", images), ("masks", np.stack([p[1] for p in pairs]))):
                file[f"train {view.lower()} {phase} {kind}"] = arrays[..., None]
    return path


def hdf5_z_scored(root):
    return hdf5(root, lambda a, _: standardised(a)), "neither 0 to 255"


def hdf5_two_scales(root):
    return hdf5(root, lambda a, i: a / np.float32(255) if i % 2 else a), r"\[1\]: .*one scale"


def hdf5_wide_and_not(root):
    return hdf5(root, lambda a, i: a * 16 if i % 2 else a), "more than one scale"


def torn_description(root):
    (root / "dataset.json").write_text('{"world": "phan')
    return root / "dataset.json", "no JSON.*restore it, or move"


def list_in_utf16(root):
    path = root / "database_split" / "subgroup_training.txt"
    path.write_text("patient0001\n", encoding="utf-16")
    return path, "no plain text; write it anew"


def no_lists(root):
    shutil.rmtree(root / "database_split")
    return root, "'none': 4.*--split all.*subgroup_training.txt"


def other_lists(root):
    for path in sorted((root / "database_split").glob("*_training.txt")):
        path.unlink()
    return root / "database_split" / "subgroup_training.txt", "no frame with split=training"


def official_already(root):
    return root, "official layout already"


def nothing(root):
    shutil.rmtree(root / "database_nifti")
    return root, "in none of its forms"


LAYOUTS = [
    *((pixel_size(v), c) for v in (0.0, -0.308, np.nan, 308.0) for c in ("check",)),
    (pixel_size(0.0), "train"),
    (uncompressed, "check"),
    (one_uncompressed, "json"),
    (nnunet_unconverted, "check"),
    (nnunet_unconverted, "json"),
    (flat_unconverted, "check"),
    (nnunet_without_labels, "convert"),
    (nnunet_z_scored, "convert"),
    (nnunet_z_scored, "all"),
    (nnunet_pixel_size, "convert"),
    (pngs_twice, "convert"),
    (pngs_black, "convert"),
    (pngs_changed_copies, "convert"),
    (hdf5_z_scored, "convert"),
    (hdf5_two_scales, "convert"),
    (hdf5_wide_and_not, "convert"),
    (torn_description, "check"),
    (torn_description, "json"),
    (torn_description, "train"),
    (list_in_utf16, "train"),
    (no_lists, "train"),
    (other_lists, "train"),
    (official_already, "convert"),
    (nothing, "convert"),
    (nothing, "all"),
]

BAD = [*GREYS, *((place, "check") for place in PLACES), *LAYOUTS]


@pytest.mark.parametrize(
    ("damage", "command"), BAD, ids=[f"{damage.__name__}-{command}" for damage, command in BAD]
)
def test_bad_input_is_named_with_a_remedy_and_nothing_is_written(
    damage, command, root, tmp_path, capfd
):
    named, words = damage(root)
    given = tmp_path / "pngs" if (tmp_path / "pngs").exists() else root
    given = tmp_path / "set.hdf5" if (tmp_path / "set.hdf5").exists() else given
    before = sorted(tmp_path.rglob("*"))
    places = {"root": given, "out": tmp_path / "out"}
    assert main([word.format(**places) for word in COMMANDS[command]]) == 1
    printed = "".join(capfd.readouterr())
    assert str(named or root / "database_nifti") in printed
    assert re.search(words, printed, re.S), printed
    assert re.search(r"; \w", printed), f"no remedy: {printed}"
    assert "Traceback" not in printed and "pixdim" not in printed
    left = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert all(path.parent == tmp_path / "workspace" for path in left if path.is_dir())
    assert not [path for path in left if path.is_file()]
    if command == "json":
        json.loads(printed)


# --- what works -----------------------------------------------------------------------------------


def pictures(root):
    return {
        (row.patient, row.view, row.phase): camus.read_frame(row)
        for row in camus.read_table(root).itertuples()
    }


def films(root):
    return {path.name: camus.read_nifti(path, dimensions=3)[0] for path in sequences(root)}


def assert_same(root, expected, tolerance=0.0):
    found = pictures(root)
    assert found.keys() == expected.keys()
    for key, (image, mask) in expected.items():
        assert found[key][0].dtype == np.float32
        np.testing.assert_allclose(found[key][0], image, atol=tolerance, err_msg=str(key))
        np.testing.assert_array_equal(found[key][1], mask, err_msg=str(key))


def sequences(root):
    return sorted(root.rglob("*_half_sequence.nii.gz"))


def overshot(array):
    array = array / np.float32(255)
    array[0, 0], array[0, 1] = -0.01, 1.02
    return array


def by_slope(root):
    for path in [*frames(root), *sequences(root)]:
        image = nib.Nifti1Image(read(path), OFFICIAL)
        image.header.set_slope_inter(1 / 255, 0)
        path.write_bytes(b"")
        nib.save(image, path)


SCALES = {  # what is done to the frames' bytes, and the black and white that must be found
    "bytes": (lambda a: a, 0, 255),
    "float 0-255": (floats(1), 0, 255),
    "float64 0-255": (lambda a: a.astype(np.float64), 0, 255),
    "overshot 0-255": (lambda a: a - 4.0 * (a == 0) + 6.0 * (a == 255), 0, 255),
    "0-1": (floats(1 / 255), 0, 1),
    "-1 to 1": (floats(2 / 255, -1), -1, 1),
    "10 bits": (lambda a: (a * (1023 / 255)).round().astype(np.int16), 0, 1023),
    "12 bits": (lambda a: (a * (4095 / 255)).round().astype(np.uint16), 0, 4095),
    "15 bits": (lambda a: (a * (32767 / 255)).round().astype(np.int16), 0, 32767),
    "16 bits": (lambda a: a.astype(np.uint16) * 257, 0, 65535),
    "float of 12 bits": (lambda a: (a * (4095 / 255)).round().astype(np.float32), 0, 4095),
}


@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_is_told_from_the_set_and_gives_the_same_pictures(scale, source, root):
    change, black, white = SCALES[scale]
    rewrite(frames(root), lambda a: change(a))
    dark = frames(root)[
        0
    ]  # a picture says nothing of its own scale: a dark one is read on the set's
    save(dark, change(read(source / dark.relative_to(root)) // 2))
    table = camus.read_table(root)
    assert set(zip(table["black"], table["white"], strict=True)) == {(black, white)}
    expected = pictures(source)
    first = (table["patient"][0], table["view"][0], table["phase"][0])
    expected[first] = (expected[first][0] // 2, expected[first][1])
    tolerance = {"10 bits": 0.2, "12 bits": 0.05, "float of 12 bits": 0.05}.get(scale, 0.01)
    assert_same(root, expected, tolerance)
    problems, notes = checks.examine(root)
    assert problems == [] and f"{black} is read as black, {white} as white" in notes[0]


def test_a_slope_in_an_8_bit_header_is_a_scale_too(source, root):
    by_slope(root)
    assert (camus.read_table(root)["white"] == 1).all()
    assert_same(root, pictures(source), 0.01)


def test_overshooting_pictures_are_as_the_others(source, root):
    """Half the frames overshoot 1: all are read alike, in NIfTI and by `convert` of HDF5."""
    rewrite(frames(root)[::2], overshot)
    rewrite(frames(root)[1::2], floats(1 / 255))
    expected = {key: (image.copy(), mask) for key, (image, mask) in pictures(source).items()}
    for key in list(expected)[::2]:
        expected[key][0][:2, 0] = 0, 255
    assert_same(root, expected, 0.01)


def test_rows_of_a_subset_carry_the_set_s_scale(root):
    rewrite(frames(root), floats(1 / 255))
    dark = rewrite(frames(root)[:1], lambda a: a / 4)
    table = camus.read_table(root)
    few = table[table["image"] == dark]
    assert camus.read_frame(few.iloc[0])[0].max() < 70


def test_many_frames_are_read_once_for_their_scale(root, monkeypatch):
    rewrite(frames(root), floats(1 / 255))
    monkeypatch.setattr(camus, "_FEW", 3)
    first = camus.read_table(root)
    read_again = []
    monkeypatch.setattr(camus, "_file_range", lambda path: read_again.append(path) or [False, 0, 1])
    assert camus.read_table(root).equals(first) and not read_again
    rewrite(frames(root)[:1], floats(1))
    camus.read_table(root)
    assert len(read_again) == 16


def canonical(paths):
    """As nibabel turns an image of one slice."""
    for path in paths:
        array = read(path)
        image = nib.Nifti1Image(array.reshape(*array.shape[:2], -1), OFFICIAL)
        nib.as_closest_canonical(image).to_filename(path)


def turned(steps, affine):
    return lambda paths: rewrite(
        paths, lambda a: a[tuple(map(slice, (None,) * 2, (None,) * 2, steps))], affine
    )


def no_affine(paths):
    rewrite(paths, affine=None)


def exchanged(paths):
    """The axes exchanged, and an affine that says so."""
    affine = OFFICIAL.copy()
    affine[:2, :2] = [[0, -0.308], [-0.308, 0]]
    rewrite(paths, lambda a: a.swapaxes(0, 1), affine)


LAID = {
    "depth": turned((1, -1), np.diag([-0.308, 0.308, 1, 1])),
    "lateral": turned((-1, 1), np.diag([0.308, -0.308, 1, 1])),
    "canonical": canonical,
    "placeholder": turned((1, 1), PLACEHOLDER),
    "unit": turned((1, 1), np.eye(4)),
    "none": no_affine,
    "exchanged": exchanged,
    "transposed": lambda paths: rewrite(paths, lambda a: a.swapaxes(0, 1)),
}


@pytest.mark.parametrize("laid", LAID)
def test_the_affine_is_honoured_and_half_sequences_turn_with_their_frames(laid, source, root):
    LAID[laid]([*files(root), *sequences(root)])
    assert_same(root, pictures(source))
    for key, film in films(source).items() if laid != "transposed" else ():  # no affine says so
        np.testing.assert_array_equal(films(root)[key], film)
    assert checks.check(root) == []


def test_frames_and_label_maps_may_lie_differently(source, root):
    canonical(maps(root))
    assert_same(root, pictures(source))


def test_exchanged_axes_have_exchanged_spacing(root):
    affine = OFFICIAL.copy()
    affine[:2, :2] = [[0, -0.25], [-0.5, 0]]
    rewrite(files(root), lambda a: a.T, affine)
    table = camus.read_table(root)
    assert np.allclose(table["lateral_mm"], 0.25) and np.allclose(table["depth_mm"], 0.5)


@pytest.mark.parametrize("damage", [empty_map, no_cavity, no_wall])
def test_prompts_leave_out_what_a_label_map_does_not_say(damage, root, tmp_path):
    damage(root)
    for cfg in root.rglob("Info_*.cfg"):
        cfg.unlink()
    assert main(["prompts", str(root), str(tmp_path / "prompts.csv")]) == 0
    frames = data.load_frames(camus.read_table(root), data.Geometry(64))
    known = prompts.facts(frames.masks, frames.table).groupby("patient")["ef"].first()
    assert known.isna().sum() == {empty_map: 1, no_cavity: 4, no_wall: 0}[damage]
    measured = anatomy.patients_ef(frames.masks, frames.table)
    assert len(measured) == 4 and measured["ef"].isna().sum() == known.isna().sum()


def test_a_missing_atrium_is_a_note_and_no_small_one(root):
    rewrite(maps(root), relabel(1, 2, 0))
    problems, notes = checks.examine(root)
    assert problems == [] and "no LA (label 3)" in notes[-1] and "16 of 16" in notes[-1]
    frames = data.load_frames(camus.read_table(root), data.Geometry(64))
    facts = prompts.facts(frames.masks, frames.table)
    assert facts["la_size"].isna().all() and facts["ef"].notna().all()


def test_one_view_alone_says_what_works(root, capsys):
    for path in root.rglob("*_2CH_*"):
        path.unlink()
    problems, notes = checks.examine(root)
    assert problems == [] and "no frame of 2CH-ED, 2CH-ES; " in notes[1]


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
    for path in frames(root):
        header(path, pixdim=[0, 0.308, 0.308, 0, 0, 0, 0, 0])
    assert checks.check(root) == [] and capfd.readouterr() == ("", "")


def test_hdf5_files_are_closed(root):
    path = hdf5(root)
    releases.convert(path, root.parent / "converted")
    with h5py.File(path, "a") as file:  # HDF5 locks a file that is open elsewhere
        assert len(file) == 8


NUMBERS = [
    f"{command} {option}"
    for command, options in {
        "phantom {out}": ["--patients 0", "--patients 2.5", "--seed -1", "--seed 99999999999"],
        "download {out}": ["--patients 0"],
        "train sdm --data {out} --out {out}": [
            *("--steps 0", "--batch 0", "--accumulation 0", "--learning-rate nan"),
            *("--learning-rate 0", "--ema 1", "--snr-gamma -5", "--minutes 0", "--minutes inf"),
            *("--latent-channels 0", "--width nan", "--views 0", "--patients 0", "--seed -1"),
        ],
        "sample sdm --checkpoint {out} --out {out}": [
            *("--n 0", "--steps 0", "--steps 1001", "--batch 0", "--patients 0", "--seed -1"),
            *("--guidance nan", "--guidance inf", "--guidance -1", "--guidance-interval -1 5"),
        ],
        "downstream segmentation --data {out}": [
            *("--share 0", "--share nan", "--seeds 0", "--steps 0", "--patients 0"),
        ],
    }.items()
    for option in options
]


@pytest.mark.parametrize("line", NUMBERS)
def test_numbers_are_checked_before_anything_is_read_or_written(line, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        main([word.format(out=out) for word in line.split()])
    option = re.search(r"--[a-z-]+(?= \S+( 5)?$)", line)[0]
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and f"argument {option}:" in said
    assert re.search("must be at least|invalid whole number", said)
    assert not out.exists()


def test_places_that_cannot_be_written_are_named(source, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("not a folder")
    for command in (
        ["phantom", "/proc/nowhere/phantom", "--patients", "1"],
        ["phantom", file / "phantom", "--patients", "1"],
        ["convert", source.parent / "none", file / "set"],
        ["prompts", source, tmp_path / "missing" / "prompts.csv"],
        ["prompts", source, tmp_path],
    ):
        assert main(command) == 1
        assert re.match(r"error: \S*/\S+: \w.*; \w+", capsys.readouterr().err), command
    assert file.read_text() == "not a folder" and list(tmp_path.iterdir()) == [file]


def test_a_run_of_other_settings_is_refused_and_kept(source, root, tmp_path, capsys):
    """Another seed, another folder, other squares, an unreadable state: named, and with a remedy."""
    out = tmp_path / "run"
    train = "train segmenter --profile smoke --split all --patients 2".split()
    train += ["--data", root, "--out", out]
    assert main(train) == 0
    state = out / "state" / "segmenter.safetensors"
    whole = state.read_bytes()
    rewrite(maps(root)[:1], lambda mask: np.roll(mask, 1))
    for extra, changed in (
        ([], "frames"),
        (["--seed", "1"], "seed"),
        (["--stretch"], "stretched"),
        (["--batch", "2"], "batch"),
    ):
        capsys.readouterr()
        assert main([*train, *extra]) == 1
        said = capsys.readouterr().err
        assert str(state) in said and "--restart" in said
        assert re.search(rf"another .*{changed} \(", said)
        assert state.read_bytes() == whole
    state.write_bytes(whole[: len(whole) // 2])
    assert main(train) == 1
    assert f"{state}: damaged" in capsys.readouterr().err
    assert main([*train, "--restart"]) == 0
