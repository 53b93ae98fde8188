"""Every form of CAMUS gives the same table and arrays; what is none is named with a remedy."""

import os
import shutil

import h5py
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from diffecho_utils import DiffEchoError, assets, camus, chapter, phantom, releases
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


def sequences(root):
    """{(patient, view): half sequence} of a folder in the official layout."""
    rows = camus.select(camus.read_table(root), phase="ED").itertuples()
    return {(row.patient, row.view): camus.read_sequence(row) for row in rows}


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
    films = sequences(source)
    for (patient, view, phase), pair in pictures(source).items():
        path = folder / "training" / patient / f"{patient}_{view}_{phase}.mhd"
        for mask, array in zip((False, True), pair, strict=True):
            write_mhd(path.with_stem(path.stem + SUFFIX[mask]), array, (0.308, 0.154))
        write_mhd(folder / "testing" / patient / path.name, pair[0], (0.308, 0.154))
        film = path.with_stem(f"{patient}_{view}_sequence")
        write_mhd(film, films[patient, view], (0.308, 0.154))
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


def as_mhd_that_lies_otherwise(source, folder):
    """Turned by half a turn, and a TransformMatrix that says so."""
    for path in as_mhd(source, folder).rglob("*.mhd"):
        raw, matrix = path.with_suffix(".raw"), "-1 0 0 0 -1 0 0 0 1"
        path.write_text(path.read_text().replace("1 0 0 0 1 0 0 0 1", matrix))
        sizes = [int(n) for n in path.read_text().split("DimSize = ")[1].split("\n")[0].split()]
        array = np.frombuffer(raw.read_bytes(), np.uint8).reshape(sizes[::-1])
        raw.write_bytes(array[..., ::-1, ::-1].tobytes())
    return folder


def as_camus_pngs_of_splits(source, folder, frames="{0}", masks="{0}", end="", change=np.asarray):
    """CAMUS's names under a folder for the frames and one for the label maps, {0} their split."""
    for row in camus.read_table(source).itertuples():
        split = {"training": "Train", "validation": "Val", "testing": "TEST"}[row.split]
        pair = camus.read_frame(row)
        for mask, place, array in zip((False, True), (frames, masks), pair, strict=True):
            name = (
                f"{row.patient}_{row.view}_{row.phase}{SUFFIX[mask and frames == masks]}{end}.png"
            )
            path = folder / place.format(split) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            array = array.astype(np.uint8)
            Image.fromarray(array if mask else change(array)).save(path)
    return folder


def as_sdm_pngs(source, folder):
    """As echo_from_noise writes them: a folder for each class, and all of them again."""
    for row in camus.read_table(source).itertuples():
        name = f"{row.patient}_{row.view}_{row.phase}_{row.split}.png"
        pair = camus.read_frame(row)
        for group in (f"{row.view}_{row.phase}", "all_views"):
            for kind, array in zip(("images", "annotations"), pair, strict=True):
                path = folder / group / kind / row.split / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array.astype(np.uint8)).save(path)
    return folder


def as_nifti(source, folder, frame, mask, end=".nii"):
    """The files under other names and in other folders; {0} is a patient's split."""
    names = {"training": "train", "validation": "valid", "testing": "test"}
    for row in camus.read_table(source).itertuples():
        for path, place in ((row.image, frame), (row.label_map, mask)):
            stem = f"{row.patient}_{row.view}_{row.phase}"
            path, copy = nib.load(path), folder / (place.format(names[row.split], stem) + end)
            copy.parent.mkdir(parents=True, exist_ok=True)
            path.to_filename(copy)
    shutil.copy(source / "dataset.json", folder)
    return folder


def as_nnunet(source, folder):
    as_nifti(source, folder, "images{0}/{1}_0000", "labels{0}/{1}", ".nii.gz")
    for old, new in (("train", "Tr"), ("test", "Ts")):
        for kind in ("images", "labels"):
            (folder / f"{kind}{old}").rename(folder / f"{kind}{new}")
    for kind in ("images", "labels"):  # nnU-Net has no folder for validation
        for path in (folder / f"{kind}valid").iterdir():
            path.rename(folder / f"{kind}Tr" / path.name)
    (folder / "dataset.json").write_text('{"channel_names": {"0": "US"}, "file_ending": ".nii.gz"}')
    return folder


def as_uncompressed(source, folder):
    shutil.copytree(source, folder)
    for path in folder.rglob("*.nii.gz"):
        nib.load(path).to_filename(path.with_suffix(""))
        path.unlink()
    return folder


FORMS = {
    "mhd": as_mhd,
    "mhd turned": as_mhd_that_lies_otherwise,
    "png splits": as_camus_pngs_of_splits,
    "png folders": lambda source, folder: as_camus_pngs_of_splits(
        source, folder, "{0}/images", "{0}/labels"
    ),
    "png 16": lambda source, folder: as_camus_pngs_of_splits(
        source, folder, change=lambda array: array.astype(np.uint16) * 257
    ),
    "png sdm": as_sdm_pngs,
    "nifti nnunet": as_nnunet,
    "nifti flat": lambda *places: as_nifti(*places, "{0}/{1}", "{0}/{1}_gt"),
    "nifti folders": lambda *places: as_nifti(*places, "{0}/images/{1}", "{0}/labels/{1}"),
    "nifti labels": lambda *places: as_nifti(
        *places, "images/{0}/{1}", "labels/{0}/{1}_gt", ".nii.gz"
    ),
    "nifti uncompressed": as_uncompressed,
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
    # matplotlib's colour map rounds some greys down
    tolerance = {"png paper": 1, "png 16": 1e-4}.get(form, 0)
    assert_same_pictures(tmp_path / "camus", expected, tolerance)
    assert camus.check(tmp_path / "camus") == [] and seen[-1] == (4, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["camus", "form"]


def test_mhd_keeps_spacing_cfg_sequences_and_world(source, tmp_path):
    release = releases.convert(as_mhd(source, tmp_path / "mhd"), tmp_path / "camus")
    table = camus.read_table(tmp_path / "camus")
    np.testing.assert_allclose(table[["lateral_mm", "depth_mm"]], [[0.308, 0.154]] * 16, atol=1e-6)
    assert (table["ef"] == 54).all() and (table["quality"] == "Good").all()
    assert table.attrs["world"] == "phantom" and set(table["split"]) == {"training"}
    films, expected = sequences(tmp_path / "camus"), sequences(source)
    assert films.keys() == expected.keys() and all((films[k] == expected[k]).all() for k in films)
    assert "16 files without their label map" in release.notes[0]


def test_splits_come_from_lists_then_folders(source, tmp_path):
    releases.convert(as_paper_pngs(source, tmp_path / "paper"), tmp_path / "a")
    table = camus.read_table(tmp_path / "a")
    splits = table.groupby("patient")["split"].first().tolist()
    assert splits == ["validation"] + ["training"] * 3 and table["lateral_mm"].isna().all()
    releases.convert(as_camus_pngs(source, tmp_path / "own"), tmp_path / "b")
    expected = camus.read_table(source).groupby("patient")["split"].first()
    assert camus.read_table(tmp_path / "b").groupby("patient")["split"].first().equals(expected)


@pytest.mark.parametrize("form", FORMS)
def test_splits_of_folders_are_kept(form, source, tmp_path):
    release = releases.recognise(FORMS[form](source, tmp_path / "form"))
    expected = camus.read_table(source).groupby("patient")["split"].first()
    if form in (
        "png splits",
        "png folders",
        "png 16",
        "png sdm",
        "nifti flat",
        "nifti folders",
        "nifti labels",
    ):
        assert release.splits == expected.to_dict()
    elif form == "nifti nnunet":
        assert release.splits == expected.replace("validation", "training").to_dict()
    if form == "png sdm":
        assert release.notes[0].startswith("32 files that are there twice taken once")


def test_foreign_descriptions_are_told_by_their_content(source, tmp_path):
    releases.convert(as_nnunet(source, tmp_path / "nnunet"), tmp_path / "a")
    assert camus.world(tmp_path / "a") == "camus"
    releases.convert(as_uncompressed(source, tmp_path / "plain"), tmp_path / "b")
    assert camus.world(tmp_path / "b") == "phantom"
    table = camus.read_table(tmp_path / "b")
    assert table["ef"].notna().all() and table["split"].notna().all()
    assert sequences(tmp_path / "b").keys() == sequences(source).keys()


def test_an_uncompressed_copy_beside_a_file_changes_nothing(source, tmp_path):
    root = shutil.copytree(source, tmp_path / "set")
    path = sorted(root.rglob("*_gt.nii.gz"))[0]
    nib.load(path).to_filename(path.with_suffix(""))
    assert releases.recognise(root).form == "official"
    path.unlink()
    assert releases.recognise(root).form == "nifti"


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


def test_grey_values_up_to_one_become_255_by_one_rule_for_the_set(source, tmp_path):
    """Every other picture overshoots 1 and 0 a little, as interpolation leaves them."""
    folder = as_hdf5(source, tmp_path / "form")
    with h5py.File(folder / "subject_based_dataset.hdf5", "a") as file:
        for key in [key for key in file if "frames" in key]:
            array = file[key][()] / np.float32(255)
            array[::2, 0, :2, 0] = -0.01, 1.02
            del file[key]
            file[key] = array
    notes = releases.convert(folder, tmp_path / "camus").notes
    assert notes[-1] == "grey values: 0 was taken for black, 1 for white"
    assert (camus.read_table(tmp_path / "camus")["white"] == 255).all()
    found = pictures(tmp_path / "camus")
    for (patient, view, phase), pair in pictures(source).items():
        image = stretched(pair)[0].copy()
        if patient in ("patient0001", "patient0003"):
            image[0, :2] = 0, 255
        np.testing.assert_allclose(found[patient, view, phase][0], image, atol=1e-3)


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


def test_chapters_take_any_form(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assets, "workspace", lambda: tmp_path / "workspace")
    _, table = chapter.begin("smoke", str(as_hdf5(source, tmp_path / "form")))
    assert len(table) == 16 and "4 patients" in capsys.readouterr().out


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
    Image.fromarray(np.zeros((64, 64), np.uint8)).convert("P").save(mask)
    with pytest.raises(DiffEchoError, match="mode P, not grey"):
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
