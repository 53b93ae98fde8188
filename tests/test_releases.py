"""Every form of CAMUS gives the same table and arrays; what is none is named with a remedy."""

import os
import shutil

import h5py
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from diffecho_utils import DiffEchoError, assets, camus, phantom, releases
from diffecho_utils.__main__ import main

SUFFIX = {True: "_gt", False: ""}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A phantom of four patients with short sequences: what the other forms are written from."""
    root = tmp_path_factory.mktemp("source") / "phantom"
    phantom.write(root, patients=4, seed=3, side=64, processes=1)
    for path in root.rglob("*_ED.nii.gz"):
        image = nib.load(path)
        film = np.stack([np.roll(image.get_fdata(), shift) for shift in range(3)], -1)
        path = path.with_name(path.name.replace("ED", "half_sequence"))
        nib.Nifti1Image(film.astype(np.float32), image.affine).to_filename(path)
    return root


def pictures(root):
    """{(patient, view, phase): (image, mask)} of a folder in the official layout."""
    rows = camus.read_table(root).itertuples()
    return {(row.patient, row.view, row.phase): camus.read_frame(row) for row in rows}


def stretched(pair):
    """(image, mask) at 48 x 48: in the HDF5 re-pack all frames have one size."""
    rows, columns = (np.linspace(0, n - 1, 48).astype(int) for n in pair[0].shape)
    return tuple(array[np.ix_(rows, columns)] for array in pair)


def assert_same_pictures(root, expected, tolerance=0):
    found = pictures(root)
    assert found.keys() == expected.keys()
    for key, (image, mask) in expected.items():
        np.testing.assert_allclose(found[key][0], image, atol=tolerance)
        np.testing.assert_array_equal(found[key][1], mask)


def write_mhd(path, array, spacing):
    """A MetaImage as the older release has it: 3-D, one slice a frame, pixels in a .raw file."""
    array = np.atleast_3d(array.T).T.astype(np.uint8)  # (T, depth, lateral)
    sizes = " ".join(map(str, array.shape[::-1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".raw").write_bytes(array.tobytes())
    path.write_text(
        f"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
        f"CompressedData = False\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\n"
        f"ElementSpacing = {spacing[0]} {spacing[1]} 1\nDimSize = {sizes}\n"
        f"ElementType = MET_UCHAR\nElementDataFile = {path.with_suffix('.raw').name}\n"
    )


def as_mhd(source, folder):
    """The older release: training/ with half sequences and older cfg keys, testing/ without label maps."""
    for (patient, view, phase), pair in pictures(source).items():
        path = folder / "training" / patient / f"{patient}_{view}_{phase}.mhd"
        for mask, array in zip((False, True), pair, strict=True):
            write_mhd(path.with_stem(path.stem + SUFFIX[mask]), array, (0.308, 0.154))
        write_mhd(folder / "testing" / patient / path.name, pair[0], (0.308, 0.154))
        film = camus.read_sequence(source, patient, view)
        write_mhd(path.with_stem(f"{patient}_{view}_sequence"), film, (0.308, 0.154))
        cfg = "LVedv: 94.0\nLVesv: 43.2\nLVef: 54\nImageQuality: Good\n"
        (path.parent / f"Info_{view}.cfg").write_text(cfg)
    shutil.copy(source / "dataset.json", folder)
    return folder


def as_hdf5(source, folder, levels=1, key="train {} {} {}"):
    folder.mkdir()
    with h5py.File(folder / "subject_based_dataset.hdf5", "w") as file:
        for view, phase in camus.CLASSES:
            frames = pictures(source).items()
            pairs = [stretched(p) for (_, v, s), p in frames if (v, s) == (view, phase)]
            for kind, index, scale in (("frames", 0, 1), ("masks", 1, levels)):
                arrays = np.stack([pair[index] for pair in pairs])[..., None] * scale
                file[key.format(view.lower(), phase, kind)] = arrays.astype(np.uint8)
    return folder


def as_paper_pngs(source, folder):
    """As the paper's script writes them: matplotlib's grey colour map, four channels, stretched masks."""
    for (patient, view, phase), pair in pictures(source).items():
        index = int(patient[-4:]) - 1
        split = "valid" if index < 1 else "train"
        for kind, array, top in zip(("frame", "mask"), pair, (255, 3), strict=True):
            name = f"ch{view[0]}_{phase.lower()}_{kind}_{index}.png"
            path = folder / f"{split}_{kind}s" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            plt.imsave(path, array, cmap="gray", vmin=0, vmax=top)
    return folder


def as_camus_pngs(source, folder):
    """CAMUS's own names, images and label maps (0-3) in two folders, and the lists."""
    for (patient, view, phase), pair in pictures(source).items():
        for mask, array in zip((False, True), pair, strict=True):
            path = folder / ("masks" if mask else "images") / f"{patient}_{view}_{phase}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path = path.with_stem(path.stem + SUFFIX[mask])
            Image.fromarray(array.astype(np.uint8)).save(path)
    shutil.copytree(source / "database_split", folder / "lists")
    return folder


FORMS = {
    "mhd": as_mhd,
    "hdf5": as_hdf5,
    "hdf5 85": lambda source, folder: as_hdf5(source, folder, levels=85),
    "png paper": as_paper_pngs,
    "png camus": as_camus_pngs,
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_same_frames(form, source, tmp_path):
    folder = FORMS[form](source, tmp_path / "form")
    release = releases.recognise(folder)
    assert release.form == form.split()[0]
    assert sorted(release.pictures) == [f"patient{i:04d}" for i in range(1, 5)]
    seen = []
    releases.convert(folder, tmp_path / "camus", progress=lambda *step: seen.append(step))
    expected = pictures(source)
    if release.form == "hdf5":
        expected = {key: stretched(pair) for key, pair in expected.items()}
    tolerance = 1 if form == "png paper" else 0  # matplotlib's colour map rounds some greys down
    assert_same_pictures(tmp_path / "camus", expected, tolerance)
    assert camus.check(tmp_path / "camus") == [] and seen[-1] == (4, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["camus", "form"]


def test_mhd_keeps_spacing_cfg_sequences_and_world(source, tmp_path):
    release = releases.convert(as_mhd(source, tmp_path / "mhd"), tmp_path / "camus")
    table = camus.read_table(tmp_path / "camus")
    np.testing.assert_allclose(table[["lateral_mm", "depth_mm"]], [[0.308, 0.154]] * 16, atol=1e-6)
    assert (table["ef"] == 54).all() and (table["quality"] == "Good").all()
    assert table.attrs["world"] == "phantom" and set(table["split"]) == {"training"}
    for patient, view in (("patient0002", "2CH"), ("patient0004", "4CH")):
        np.testing.assert_array_equal(
            camus.read_sequence(tmp_path / "camus", patient, view),
            camus.read_sequence(source, patient, view),
        )
    assert "16 files without their label map" in release.notes[0]


def test_splits_come_from_lists_then_folders(source, tmp_path):
    releases.convert(as_paper_pngs(source, tmp_path / "paper"), tmp_path / "a")
    table = camus.read_table(tmp_path / "a")
    splits = table.groupby("patient")["split"].first().tolist()
    assert splits == ["validation"] + ["training"] * 3 and table["lateral_mm"].isna().all()
    releases.convert(as_camus_pngs(source, tmp_path / "own"), tmp_path / "b")
    expected = camus.read_table(source).groupby("patient")["split"].first()
    assert camus.read_table(tmp_path / "b").groupby("patient")["split"].first().equals(expected)


def test_hdf5_validates_on_the_first_subjects_as_the_paper(tmp_path):
    path = tmp_path / "subject_based_dataset.hdf5"
    with h5py.File(path, "w") as file:
        for view, phase in camus.CLASSES:
            for kind in ("frames", "masks"):
                file[f"train {view.lower()} {phase} {kind}"] = np.zeros((52, 4, 4, 1), np.uint8)
    release = releases.recognise(path)
    chosen = [patient for patient, split in release.splits.items() if split == "validation"]
    assert chosen == [f"patient{i:04d}" for i in range(1, camus.PAPER_VALIDATION + 1)]
    assert "not CAMUS's own numbers" in release.notes[0]


def test_grey_values_up_to_one_become_255(source, tmp_path):
    folder = as_hdf5(source, tmp_path / "form")
    with h5py.File(folder / "subject_based_dataset.hdf5", "a") as file:
        for key in [key for key in file if "frames" in key]:
            array = file[key][()] / np.float32(255)
            del file[key]
            file[key] = array
    releases.convert(folder, tmp_path / "camus")
    found = pictures(tmp_path / "camus")
    for key, pair in pictures(source).items():
        np.testing.assert_allclose(found[key][0], stretched(pair)[0], atol=1e-3)


def test_data_of_any_form_is_converted_once(source, tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "workspace", lambda: tmp_path / "workspace")
    assert releases.official(source) == source
    folder = as_camus_pngs(source, tmp_path / "png")
    table = releases.open_table(folder)
    assert len(table) == 16
    with monkeypatch.context() as patch:
        patch.setattr(releases, "convert", lambda *_: pytest.fail("converted again"))
        assert str(releases.official(folder)) == table.attrs["root"]
    os.utime(next(folder.rglob("*.png")), ns=(1, 1))
    assert str(releases.official(folder)) != table.attrs["root"]


def test_conversion_that_another_process_finished_first_is_used(source, tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "workspace", lambda: tmp_path / "workspace")
    folder, convert = as_camus_pngs(source, tmp_path / "png"), releases.convert

    def late(path, dest, progress):
        convert(path, dest)
        return convert(path, dest, progress)

    monkeypatch.setattr(releases, "convert", late)
    assert len(releases.open_table(folder)) == 16


def test_commands_take_any_form(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assets, "workspace", lambda: tmp_path / "workspace")
    folder = as_hdf5(source, tmp_path / "form")
    assert main(["convert", str(folder), str(tmp_path / "camus")]) == 0
    assert "note: patients are numbered" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "camus")]) == 0
    train = ["train", "autoencoder", "--profile", "none", "--out", str(tmp_path / "out")]
    assert main([*train, "--data", str(folder)]) == 1  # no such profile, but the data was read
    printed = capsys.readouterr().out
    assert "read by way of" in printed and "note: patients are numbered" in printed
    assert main([*train, "--data", str(tmp_path / "nowhere")]) == 1
    assert "no such file or folder" in capsys.readouterr().err


def first(folder, pattern):
    return sorted(folder.rglob(pattern))[0]


def damage_truncated_raw(folder):
    first(folder / "training", "*_ED.raw").write_bytes(b"123")
    return "unreadable .*pixel file missing, damaged or too short"


def damage_label(folder):
    path = first(folder / "training", "*_gt.raw")
    path.write_bytes(b"\x07" + path.read_bytes()[1:])
    return r"levels \[0, 1, 2, 3, 7\]"


def damage_shape(folder):
    write_mhd(first(folder / "training", "*_ED.mhd"), np.ones((9, 8)), (1, 1))
    return r"shape \(9, 8\), its label map \(\d+, \d+\)"


def damage_twice(folder):
    shutil.copytree(folder / "training", folder / "validation")
    return "is under training and validation folders"


def damage_no_masks(folder):
    shutil.rmtree(folder / "training")
    return "16 frames, none with its label map"


@pytest.mark.parametrize(
    "damage",
    [damage_truncated_raw, damage_label, damage_shape, damage_twice, damage_no_masks],
)
def test_damage_is_named_and_nothing_is_written(damage, source, tmp_path):
    folder = as_mhd(source, tmp_path / "form")
    reason = damage(folder)
    with pytest.raises(DiffEchoError, match=reason) as error:
        releases.convert(folder, tmp_path / "camus")
    assert str(error.value).startswith(str(folder))
    assert [p.name for p in tmp_path.iterdir()] == ["form"]


def test_stretched_and_binary_masks_are_refused(source, tmp_path):
    folder = as_paper_pngs(source, tmp_path / "form")
    mask = first(folder, "ch2_ed_mask_0.png")
    for levels in ([0, 127, 255], [0, 255]):
        Image.fromarray(np.resize(np.uint8(levels), (64, 64))).save(mask)
        with pytest.raises(DiffEchoError, match="neither 0-3 nor 0/85/170/255") as error:
            releases.convert(folder, tmp_path / "camus")
        assert str(error.value).startswith(f"{mask}: levels")
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(mask)
    with pytest.raises(DiffEchoError, match="not 8-bit grey"):
        releases.convert(folder, tmp_path / "camus")


def test_what_is_no_camus_is_said(source, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DiffEchoError, match="in none of its forms"):
        releases.recognise(tmp_path / "empty")
    with pytest.raises(DiffEchoError, match="no such file"):
        releases.recognise(tmp_path / "nowhere")
    with pytest.raises(DiffEchoError, match="no HDF5 file"):
        releases.recognise(source / "dataset.json")
    with pytest.raises(DiffEchoError, match="official layout already"):
        releases.convert(source, tmp_path / "camus")
    folder = as_hdf5(source, tmp_path / "other", key="test {} {} {}")
    with pytest.raises(DiffEchoError, match="no array 'train 2ch ED frames'"):
        releases.recognise(folder)
    (tmp_path / "there").mkdir()
    with pytest.raises(DiffEchoError, match="exists; name a new folder"):
        releases.convert(as_camus_pngs(source, tmp_path / "png"), tmp_path / "there")
    with pytest.raises(DiffEchoError, match="one level too low"):
        releases.open_table(source / "database_nifti")
