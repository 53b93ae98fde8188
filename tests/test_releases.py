"""Every form of CAMUS gives the same table and arrays; what is none is named with a remedy."""

import os
import re
import shutil
from functools import partial
from unittest import mock

import h5py
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest
from conftest import assert_same_pictures, pictures
from PIL import Image

from diffecho_utils import DiffEchoError, assets, camus, chapter, checks, releases
from diffecho_utils.__main__ import main


@pytest.fixture
def source(filmed_root):
    """What the other forms are written from."""
    return filmed_root


def put(path, write, *content):
    """write(path, *content) into a folder that need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, *content)


def png(path, array):
    Image.fromarray(array).save(path)


def stretched(pair):
    """(image, mask) at 48 x 48: in the HDF5 re-pack all frames have one size."""
    rows, columns = (np.linspace(0, n - 1, 48).astype(int) for n in pair[0].shape)
    return tuple(array[np.ix_(rows, columns)] for array in pair)


def write_mhd(path, array, spacing):
    """A MetaImage as the older release has it: 3-D, one slice a frame, pixels in a .raw file."""
    array = np.atleast_3d(array.T).T.astype(np.uint8)  # (T, depth, lateral)
    sizes = " ".join(map(str, array.shape[::-1]))
    path.with_suffix(".raw").write_bytes(array.tobytes())
    path.write_text(
        f"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
        f"CompressedData = False\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\n"
        f"ElementSpacing = {spacing[0]} {spacing[1]} 1\nDimSize = {sizes}\n"
        f"ElementType = MET_UCHAR\nElementDataFile = {path.with_suffix('.raw').name}\n"
    )


def as_mhd(source, folder):
    """The older release: training/ with half sequences and older cfg keys, testing/ without label maps."""
    for (patient, view, phase), (image, mask) in pictures(source).items():
        path = folder / "training" / patient / f"{patient}_{view}_{phase}.mhd"
        film = np.stack([image, image, image])
        for end, array in ((phase, image), (f"{phase}_gt", mask), ("sequence", film)):
            put(path.with_stem(f"{patient}_{view}_{end}"), write_mhd, array, (0.308, 0.154))
        put(folder / "testing" / patient / path.name, write_mhd, image, (0.308, 0.154))
        cfg = "LVedv: 94.0\nLVesv: 43.2\nLVef: 54\nImageQuality: Good\n"
        (path.parent / f"Info_{view}.cfg").write_text(cfg)
    shutil.copy(source / "dataset.json", folder)


def as_mhd_that_lies_otherwise(source, folder):
    """Turned by half a turn, and a TransformMatrix that says so."""
    as_mhd(source, folder)
    for path in folder.rglob("*.mhd"):
        raw, matrix = path.with_suffix(".raw"), "-1 0 0 0 -1 0 0 0 1"
        path.write_text(path.read_text().replace("1 0 0 0 1 0 0 0 1", matrix))
        sizes = [int(n) for n in path.read_text().split("DimSize = ")[1].split("\n")[0].split()]
        array = np.frombuffer(raw.read_bytes(), np.uint8).reshape(sizes[::-1])
        raw.write_bytes(array[..., ::-1, ::-1].tobytes())


def as_hdf5(source, folder, levels=1, key="train {} {} {}"):
    folder.mkdir()
    with h5py.File(folder / "subject_based_dataset.hdf5", "w") as file:
        for view, phase in camus.CLASSES:
            found = pictures(source).items()
            pairs = [stretched(p) for (_, v, s), p in found if (v, s) == (view, phase)]
            for kind, index, scale in (("frames", 0, 1), ("masks", 1, levels)):
                arrays = np.stack([pair[index] for pair in pairs])[..., None] * scale
                file[key.format(view.lower(), phase, kind)] = arrays.astype(np.uint8)


def as_paper_pngs(source, folder):
    """As the paper's script writes them: matplotlib's grey colour map, four channels, stretched masks."""
    for (patient, view, phase), pair in pictures(source).items():
        index = int(patient[-4:]) - 1
        split = "valid" if index < 1 else "train"
        for kind, array, top in zip(("frame", "mask"), pair, (255, 3), strict=True):
            name = f"ch{view[0]}_{phase.lower()}_{kind}_{index}.png"
            save = partial(plt.imsave, cmap="gray", vmin=0, vmax=top)
            put(folder / f"{split}_{kind}s" / name, save, array)


def as_pngs(source, folder, frame, mask, change=np.asarray):
    """CAMUS's names under other ones; {0} is a patient's split, {1} the name, {2} the class."""
    for row in camus.read_table(source).itertuples():
        split = {"training": "Train", "validation": "Val", "testing": "TEST"}[row.split]
        names = split, f"{row.patient}_{row.view}_{row.phase}", f"{row.view}_{row.phase}"
        image, labels = (array.astype(np.uint8) for array in camus.read_frame(row))
        put(folder / f"{frame.format(*names)}.png", png, change(image))
        put(folder / f"{mask.format(*names)}.png", png, labels)


def as_pngs_with_lists(source, folder):
    as_pngs(source, folder, "images/{1}", "masks/{1}_gt")
    shutil.copytree(source / "database_split", folder / "lists")


def as_sdm_pngs(source, folder):
    """As echo_from_noise writes them: a folder for each class, and all of them again."""
    for group in ("{2}", "all_views"):
        names = (f"{group}/{kind}/{{0}}/{{1}}_training" for kind in ("images", "annotations"))
        as_pngs(source, folder, *names)


def as_nifti(source, folder, frame, mask, splits=("train", "valid", "test"), end=".nii"):
    """The files under other names and in other folders; {0} is a patient's split, {1} the name."""
    names = dict(zip(camus.SPLITS, splits, strict=True))
    for row in camus.read_table(source).itertuples():
        stem = f"{row.patient}_{row.view}_{row.phase}"
        for path, place in ((row.image, frame), (row.label_map, mask)):
            copy = folder / (place.format(names[row.split], stem) + end)
            put(copy, nib.load(path).to_filename)
    shutil.copy(source / "dataset.json", folder)


def as_nnunet(source, folder):
    """Which has no folder for validation."""
    names = ("images{0}/{1}_0000", "labels{0}/{1}")
    as_nifti(source, folder, *names, ("Tr", "Tr", "Ts"), ".nii.gz")
    (folder / "dataset.json").write_text('{"channel_names": {"0": "US"}, "file_ending": ".nii.gz"}')


def as_uncompressed(source, folder):
    shutil.copytree(source, folder)
    for path in folder.rglob("*.nii.gz"):
        nib.load(path).to_filename(path.with_suffix(""))
        path.unlink()


FORMS = {  # and whether the folders' names tell the splits
    "mhd": (as_mhd, False),
    "mhd turned": (as_mhd_that_lies_otherwise, False),
    "png splits": (partial(as_pngs, frame="{0}/{1}", mask="{0}/{1}_gt"), True),
    "png folders": (partial(as_pngs, frame="{0}/images/{1}", mask="{0}/labels/{1}"), True),
    "png 16": (
        partial(as_pngs, frame="{0}/{1}", mask="{0}/{1}_gt", change=lambda a: np.uint16(a) * 257),
        True,
    ),
    "png sdm": (as_sdm_pngs, True),
    "nifti nnunet": (as_nnunet, True),
    "nifti flat": (partial(as_nifti, frame="{0}/{1}", mask="{0}/{1}_gt"), True),
    "nifti folders": (partial(as_nifti, frame="{0}/images/{1}", mask="{0}/labels/{1}"), True),
    "nifti labels": (
        partial(as_nifti, frame="images/{0}/{1}", mask="labels/{0}/{1}_gt", end=".nii.gz"),
        True,
    ),
    "nifti uncompressed": (as_uncompressed, False),
    "hdf5": (as_hdf5, False),
    "hdf5 85": (partial(as_hdf5, levels=85), False),
    "png paper": (as_paper_pngs, False),
    "png lists": (as_pngs_with_lists, False),
}


@pytest.fixture
def made(source, tmp_path):
    """made(form): a folder of that form, made from `source`."""

    def make(form):
        folder = tmp_path / "form"
        FORMS[form][0](source, folder)
        return folder

    return make


def splits_of(table):
    return table.groupby("patient")["split"].first().to_dict()


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_same_frames(form, source, made, tmp_path):
    folder, progress = made(form), mock.Mock()
    release = releases.convert(folder, tmp_path / "camus", progress)
    assert release.form == form.split()[0] and len(release.pictures) == 4
    expected = pictures(source)
    if release.form == "hdf5":
        expected = {key: stretched(pair) for key, pair in expected.items()}
    # matplotlib's colour map rounds some greys down
    tolerance = {"png paper": 1, "png 16": 1e-4}.get(form, 0)
    assert_same_pictures(tmp_path / "camus", expected, tolerance)
    assert checks.check(tmp_path / "camus") == []
    assert progress.call_args.args == (4, 4, "patients")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["camus", "form"]
    if FORMS[form][1]:
        splits = splits_of(camus.read_table(source))
        if form == "nifti nnunet":
            splits = {who: its.replace("validation", "training") for who, its in splits.items()}
        assert release.splits == splits
    if form == "png sdm":
        assert release.notes[0].startswith("32 files that are there twice taken once")


@pytest.mark.parametrize("form", ["mhd", "mhd turned"])
def test_mhd_keeps_spacing_cfg_and_world_but_no_sequences(form, source, made, tmp_path):
    release = releases.convert(made(form), tmp_path / "camus")
    table = camus.read_table(tmp_path / "camus")
    np.testing.assert_allclose(table[["lateral_mm", "depth_mm"]], [[0.308, 0.154]] * 16, atol=1e-6)
    assert (table["ef"] == 54).all() and (table["quality"] == "Good").all()
    assert table.attrs["world"] == "phantom" and set(table["split"]) == {"training"}
    assert not [*(tmp_path / "camus").rglob("*sequence*")]
    assert "16 files without their label map" in release.notes[0]


def test_lists_and_facts_come_along(source, tmp_path):
    def converted(form):
        FORMS[form][0](source, tmp_path / form)
        releases.convert(tmp_path / form, tmp_path / f"{form} camus")
        return camus.read_table(tmp_path / f"{form} camus")

    table = converted("png paper")
    assert list(splits_of(table).values()) == ["validation"] + ["training"] * 3
    assert table["lateral_mm"].isna().all()
    assert splits_of(converted("png lists")) == splits_of(camus.read_table(source))
    assert converted("nifti nnunet").attrs["world"] == "camus", "another tool's dataset.json"
    table = converted("nifti uncompressed")
    assert table["ef"].notna().all() and table["split"].notna().all()
    assert table.attrs["world"] == "phantom"


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
    assert chosen == [f"patient{i:04d}" for i in range(1, 51)]
    assert "not CAMUS's own numbers" in release.notes[0]


def test_grey_values_up_to_one_become_255_by_one_rule_for_the_set(source, made, tmp_path):
    """Every other picture overshoots 1 and 0 a little, as interpolation leaves them."""
    folder = made("hdf5")
    with h5py.File(folder / "subject_based_dataset.hdf5", "a") as file:
        for key in [key for key in file if "frames" in key]:
            array = file[key][()] / np.float32(255)
            array[::2, 0, :2, 0] = -0.01, 1.02
            del file[key]
            file[key] = array
    notes = releases.convert(folder, tmp_path / "camus").notes
    assert notes[-1] == "grey values: 0 was taken for black, 1 for white"
    assert (camus.read_table(tmp_path / "camus")["white"] == 255).all()
    expected = {key: stretched(pair) for key, pair in pictures(source).items()}
    for (patient, *_), (image, _) in expected.items():
        if patient in ("patient0001", "patient0003"):
            image[0, :2] = 0, 255
    assert_same_pictures(tmp_path / "camus", expected, 1e-3)


def test_data_of_any_form_is_converted_once(source, made, tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "workspace", lambda: tmp_path / "workspace")
    assert releases.official(source) == source
    folder, convert = made("png lists"), releases.convert

    def late(path, dest, progress):  # another process finishes first
        convert(path, dest)
        return convert(path, dest, progress)

    with monkeypatch.context() as patch:
        patch.setattr(releases, "convert", late)
        root = releases.official(folder)
    assert len(camus.read_table(root)) == 16
    with monkeypatch.context() as patch:
        patch.setattr(releases, "convert", lambda *_: pytest.fail("converted again"))
        assert releases.official(folder) == root
    os.utime(next(folder.rglob("*.png")), ns=(1, 1))
    assert releases.official(folder) != root


def test_chapters_and_commands_take_any_form(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assets, "workspace", lambda: tmp_path / "workspace")
    folder = made("hdf5")
    train = ["train", "autoencoder", "--profile", "none", "--out", str(tmp_path / "out")]
    assert main([*train, "--data", str(folder)]) == 1  # no such profile, but the data was read
    printed = capsys.readouterr().out
    assert "read by way of" in printed and "note: patients are numbered" in printed
    assert main([*train, "--data", str(tmp_path / "nowhere")]) == 1
    assert "no such file or folder" in capsys.readouterr().err
    assert main(["convert", str(folder), str(tmp_path / "camus")]) == 0
    assert "note: patients are numbered" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "camus")]) == 0
    _, table = chapter.begin("smoke", str(folder))
    assert len(table) == 16 and "4 patients" in capsys.readouterr().out


def first(folder, pattern):
    return sorted(folder.rglob(pattern))[0]


def truncated(folder):
    first(folder / "training", "*_ED.raw").write_bytes(b"123")


def label_seven(folder):
    path = first(folder / "training", "*_gt.raw")
    path.write_bytes(b"\x07" + path.read_bytes()[1:])


DAMAGE = {
    "unreadable .*pixel file missing, damaged or too short": truncated,
    r"levels \[0, 1, 2, 3, 7\]": label_seven,
    r"shape \(9, 8\), its label map \(\d+, \d+\)": lambda folder: write_mhd(
        first(folder / "training", "*_ED.mhd"), np.ones((9, 8)), (1, 1)
    ),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_damage_is_named_and_nothing_is_written(words, made, tmp_path):
    folder = made("mhd")
    DAMAGE[words](folder)
    with pytest.raises(DiffEchoError, match=f"^{re.escape(str(folder))}.*{words}"):
        releases.convert(folder, tmp_path / "camus")
    assert [p.name for p in tmp_path.iterdir()] == ["form"]


def test_stretched_and_binary_masks_are_refused(made, tmp_path):
    folder = made("png paper")
    mask = first(folder, "ch2_ed_mask_0.png")
    for levels in ([0, 127, 255], [0, 255]):
        png(mask, np.resize(np.uint8(levels), (64, 64)))
        with pytest.raises(DiffEchoError, match=f"^{mask}: levels.*neither 0-3 nor 0/85/170/255"):
            releases.convert(folder, tmp_path / "camus")
    Image.fromarray(np.zeros((64, 64), np.uint8)).convert("P").save(mask)
    with pytest.raises(DiffEchoError, match="mode P, not grey"):
        releases.convert(folder, tmp_path / "camus")


def test_what_is_no_camus_is_said(source, made, tmp_path):
    (tmp_path / "empty").mkdir()
    as_hdf5(source, tmp_path / "other", key="test {} {} {}")
    for call, words in (
        (lambda: releases.recognise(source / "dataset.json"), "no HDF5 file"),
        (lambda: releases.recognise(tmp_path / "other"), "no array 'train 2ch ED frames'"),
        (lambda: releases.convert(source / "database_nifti", tmp_path / "camus"), "too low"),
        (
            lambda: releases.convert(made("png lists"), tmp_path / "empty"),
            "exists; name a new folder",
        ),
    ):
        with pytest.raises(DiffEchoError, match=words):
            call()
