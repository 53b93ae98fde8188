"""The folder becomes a table; whatever is wrong with it is named, with the path and a remedy."""

import gzip
import json
import re
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from diffecho_utils import DiffEchoError, camus
from diffecho_utils.__main__ import main


def write(path, array, spacing=0.308):
    nib.Nifti1Image(array, np.diag([-spacing, -spacing, 1, 1])).to_filename(path)


def test_table_has_every_frame_with_its_facts(phantom_root):
    table = camus.read_table(phantom_root)
    assert len(table) == 40 and table.attrs["world"] == "phantom"
    assert set(zip(table["view"], table["phase"], strict=True)) == set(camus.CLASSES)
    assert table["split"].notna().all() and (table.groupby("patient")["split"].nunique() == 1).all()
    assert table["lateral_mm"].between(0.1, 1.5).all()
    assert (
        table["ef"].between(5, 85).all() and table["quality"].isin(["Good", "Medium", "Poor"]).all()
    )


def test_frame_is_a_picture_with_the_probe_at_the_top(phantom_root):
    for row in camus.read_table(phantom_root).itertuples():
        image, mask = camus.read_frame(row)
        assert image.dtype == np.float32 and mask.dtype == np.uint8 and image.shape == mask.shape
        depth_of = {
            name: np.nonzero(mask == label)[0].mean() for name, label in camus.LABELS.items()
        }
        assert depth_of["LA"] > depth_of["LV cavity"]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int16])
def test_number_type_does_not_matter(broken_root, dtype):
    row = next(camus.read_table(broken_root).itertuples())
    before, _ = camus.read_frame(row)
    write(row.image, np.asarray(nib.load(row.image).dataobj).astype(dtype))
    np.testing.assert_array_equal(camus.read_frame(row)[0], before)


def test_transposed_release_gives_the_same_pictures_and_spacing(broken_root):
    before = camus.read_table(broken_root)
    pictures = [camus.read_frame(row) for row in before.itertuples()]
    for path in [*before["image"], *before["label_map"]]:
        array = np.asarray(nib.load(path).dataobj)
        nib.Nifti1Image(array.T, np.diag([-0.5, -0.25, 1, 1])).to_filename(path)
    after = camus.read_table(broken_root)
    assert after["transposed"].all() and not before["transposed"].any()
    for row, (image, mask) in zip(after.itertuples(), pictures, strict=True):
        got = camus.read_frame(row)
        np.testing.assert_array_equal(got[0], image)
        np.testing.assert_array_equal(got[1], mask)
        assert (row.lateral_mm, row.depth_mm) == (0.25, 0.5)


def test_placeholder_spacing_is_unknown(broken_root):
    row = next(camus.read_table(broken_root).itertuples())
    write(row.image, np.asarray(nib.load(row.image).dataobj), spacing=1.0)
    table = camus.read_table(broken_root)
    assert table["lateral_mm"].isna().sum() == 1


def test_older_cfg_keys_and_missing_cfg(broken_root):
    folder = broken_root / "database_nifti" / "patient0001"
    (folder / "Info_2CH.cfg").write_text("LVedv: 94.0\nLVesv: 43.2\nLVef: 54\nImageQuality: Good\n")
    (folder / "Info_4CH.cfg").unlink()
    table = camus.read_table(broken_root).set_index(["patient", "view"])
    assert (table.loc[("patient0001", "2CH"), "ef"] == 54).all()
    assert table.loc[("patient0001", "4CH"), "ef"].isna().all()


def test_wrong_level_is_named_with_the_folder_to_pass(phantom_root, tmp_path):
    patients = phantom_root / "database_nifti"
    for folder, word in (
        (phantom_root.parent, "one level too high"),
        (patients, "one level too low"),
        (patients / "patient0001", "two levels too low"),
    ):
        with pytest.raises(DiffEchoError, match=word) as error:
            camus.read_table(folder)
        assert str(phantom_root) in str(error.value)
    with pytest.raises(DiffEchoError, match="no such folder"):
        camus.read_table(tmp_path / "nowhere")
    with pytest.raises(DiffEchoError, match="no database_nifti/ in it"):
        camus.read_table(tmp_path)
    (tmp_path / "database_nifti").mkdir()
    with pytest.raises(DiffEchoError, match="no patientNNNN folder"):
        camus.read_table(tmp_path)


def damage(root):
    """Every kind of damage at once: {path that must be named: word of the problem}."""
    patients = root / "database_nifti"
    files = {
        name: camus.frame_path(root, f"patient{i:04d}", "2CH", "ED", mask)
        for i, (name, mask) in enumerate(
            [
                ("lost mask", True),
                ("lost frame", False),
                ("truncated", False),
                ("label 7", True),
                ("other shape", True),
                ("sequence", False),
            ],
            start=1,
        )
    }
    files["lost mask"].unlink()
    files["lost frame"].unlink()
    files["truncated"].write_bytes(files["truncated"].read_bytes()[:900])
    mask = np.asarray(nib.load(files["label 7"]).dataobj).copy()
    mask[0, 0] = 7
    write(files["label 7"], mask)
    write(files["other shape"], np.zeros((20, 30), np.uint8))
    write(files["sequence"], np.zeros((20, 30, 9), np.float32))
    cfg = patients / "patient0007" / "Info_2CH.cfg"
    cfg.write_bytes(b"\xff\xfe\x00 nonsense")
    empty, twice = (
        root / "database_split" / f"subgroup_{s}.txt" for s in ("testing", "validation")
    )
    empty.write_text("\n")
    trained = (root / "database_split" / "subgroup_training.txt").read_text().split()[0]
    twice.write_text(twice.read_text() + f"\n{trained}\n")
    return {
        files["lost mask"]: "missing",
        files["lost frame"]: "missing",
        files["truncated"]: "truncated|unreadable",
        files["label 7"]: r"labels \[7",
        files["other shape"]: r"shape \(20, 30\) differs",
        files["sequence"]: "half sequence",
        cfg: "not a cfg",
        empty: "empty list",
        twice: f"{trained} is in training too",
    }


def test_check_lists_all_damage_at_once(broken_root):

    expected = damage(broken_root)
    problems = camus.check(broken_root)
    assert len(problems) == len(expected), "\n".join(problems)
    for path, word in expected.items():
        line = [p for p in problems if p.startswith(f"{path}: ")]
        assert len(line) == 1 and re.search(word, line[0]), (path, line)
        assert re.search(r"[;,] (copy|restore|a |take|and|or|delete|use)", line[0]), (
            f"no remedy: {line[0]}"
        )


@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", gzip.compress(bytes(348), mtime=0), gzip.compress(b"x", mtime=0)],
    ids=["empty", "no gzip", "header only", "one byte"],
)
def test_what_is_no_nifti_is_named_by_the_table(content, broken_root):
    path = camus.frame_path(broken_root, "patient0001", "2CH", "ED")
    path.write_bytes(content)
    with pytest.raises(DiffEchoError, match=f"{path}: unreadable") as error:
        camus.read_table(broken_root)
    assert "copy or download it again" in str(error.value)


def test_command_line_check(broken_root, phantom_root, capsys):
    assert main(["check", str(phantom_root)]) == 0
    assert "all usable" in capsys.readouterr().out
    damage(broken_root)
    assert main(["check", str(broken_root), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["usable"] and len(report["problems"]) == 9
    assert main(["check", str(broken_root / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().out


def test_table_refuses_a_damaged_folder_in_short(broken_root):
    damage(broken_root)
    with pytest.raises(DiffEchoError, match="python -m diffecho_utils check"):
        camus.read_table(broken_root)


def test_select_never_returns_nothing(phantom_root):
    table = camus.read_table(phantom_root)
    assert camus.select(table, split="training", patients=2).patient.nunique() == 2
    with pytest.raises(DiffEchoError, match="patients in each split"):
        camus.select(table.assign(split="training"), split="testing")


def test_one_view_alone_is_usable(broken_root):
    for path in broken_root.glob("database_nifti/*/*_2CH_*"):
        path.unlink()
    table = camus.read_table(broken_root)
    assert set(table["view"]) == {"4CH"} and camus.check(broken_root) == []


def test_no_lists_is_no_split(broken_root):
    shutil.rmtree(broken_root / "database_split")
    assert camus.read_table(broken_root)["split"].isna().all()


def write_fold_lists(root, patients, k=10, folder="listSubGroups"):
    """The lists of the older release: `subGroupN_testing.txt`, patients dealt in turn."""
    (root / folder).mkdir()
    for fold in range(1, k + 1):
        names = "\n".join(patients[fold - 1 :: k])
        (root / folder / f"subGroup{fold}_testing.txt").write_text(f"{names}\n")


def assert_patients_stay_together(table, column):
    assert table[column].notna().all()
    assert (table.groupby("patient")[column].nunique() == 1).all()


def test_official_folds(broken_root):
    table = camus.read_table(broken_root)
    write_fold_lists(broken_root, table["patient"].unique())
    table = camus.split_by_fold(camus.read_folds(table), testing=5)
    assert_patients_stay_together(table, "fold")
    assert_patients_stay_together(table, "split")
    split = table.groupby("patient")["split"].first()
    assert split["patient0005"] == "testing" and split["patient0006"] == "validation"
    assert split.value_counts()["training"] == 8
    last = camus.split_by_fold(table, testing=10).groupby("patient")["split"].first()
    assert last["patient0010"] == "testing" and last["patient0001"] == "validation"
    with pytest.raises(DiffEchoError, match="no fold 11; ask for 1 to 10"):
        camus.split_by_fold(table, testing=11)


def test_faults_of_the_fold_lists_are_named(broken_root):
    table = camus.read_table(broken_root)
    with pytest.raises(DiffEchoError, match="no subgroup1_testing.txt.*camus.make_folds"):
        camus.read_folds(table)
    write_fold_lists(broken_root, table["patient"].unique())
    path = broken_root / "listSubGroups" / "subGroup3_testing.txt"
    path.write_text("patient0001\n")
    with pytest.raises(DiffEchoError, match="patient0001 is in fold 1 too"):
        camus.read_folds(table)
    path.write_text("patient0499\n")
    with pytest.raises(DiffEchoError, match="1 patients in no fold, patient0003 the first"):
        camus.read_folds(table)


def many_patients(patients=97, seed=0):
    """A table of this many patients, four frames each, with a rare kind: good images of weak hearts."""
    rng = np.random.default_rng(seed)
    names = [f"patient{i:04d}" for i in range(1, patients + 1)]
    ef = pd.Series(rng.uniform(15, 75, patients), names)
    worst = pd.Series(rng.choice(["Good", "Medium", "Poor"], patients, p=[0.35, 0.46, 0.19]), names)
    rows = [
        dict(patient=name, view=view, phase=phase, ef=ef[name], quality=worst[name])
        for name in names
        for view, phase in camus.CLASSES
    ]
    table = pd.DataFrame(rows)
    table.loc[table["view"] == "4CH", "quality"] = "Good"  # the better view of each patient
    return table, ef, worst


@pytest.mark.parametrize("k", [2, 5, 10])
def test_made_folds_keep_patients_together_and_are_stratified(k):
    table, ef, worst = many_patients()
    folds = camus.make_folds(table, k)
    assert_patients_stay_together(folds, "fold")
    fold = folds.groupby("patient")["fold"].first()
    assert sorted(fold.unique()) == list(range(1, k + 1))
    assert np.ptp(fold.value_counts()) <= 1
    for quality in ("Good", "Medium", "Poor"):
        counts = fold[worst == quality].value_counts().reindex(range(1, k + 1), fill_value=0)
        assert np.ptp(counts) <= 2, quality
    means = ef.groupby(fold).mean()
    shuffled = [
        np.ptp(ef.groupby(fold.sample(frac=1, random_state=s).to_numpy()).mean()) for s in range(50)
    ]
    assert np.ptp(means) < np.median(shuffled)
    assert camus.make_folds(table, k)["fold"].equals(folds["fold"])
    assert not camus.make_folds(table, k, seed=1)["fold"].equals(folds["fold"])


def test_made_folds_take_ejection_fractions_from_elsewhere():
    table, ef, _ = many_patients()
    silent = table.assign(ef=np.nan)
    assert camus.make_folds(silent, 5, ef=ef)["fold"].equals(camus.make_folds(table, 5)["fold"])
    assert_patients_stay_together(camus.make_folds(silent.assign(quality=None), 5), "fold")


def test_too_few_patients_for_the_folds(phantom_root):
    table = camus.read_table(phantom_root)
    assert camus.make_folds(table, 10)["fold"].value_counts().tolist() == [4] * 10
    for k in (11, 1):
        with pytest.raises(DiffEchoError, match=f"{k} folds of 10 patients; ask for 2 to 10"):
            camus.make_folds(table, k)


def test_split_of_the_paper(phantom_root):
    table = camus.split_as_paper(camus.read_table(phantom_root), validation=3)
    chosen = table[table["split"] == "validation"]["patient"].unique()
    assert chosen.tolist() == ["patient0001", "patient0002", "patient0003"]
    assert (table["split"] == "training").sum() == 28
    with pytest.raises(DiffEchoError, match="50 of 10 patients"):
        camus.split_as_paper(table)


def test_real_folds(real_root):
    table = camus.make_folds(camus.read_table(real_root))
    assert_patients_stay_together(table, "fold")
    assert table.groupby("fold")["patient"].nunique().tolist() == [45] * 10
    paper = camus.split_as_paper(table).groupby("split")["patient"].nunique().to_dict()
    assert paper == {"training": 400, "validation": 50}


def test_real_frames_have_nothing_to_report(real_root):
    problems, notes = camus.examine(real_root)
    assert problems == [] and len(notes) == 1 and "8-bit frames; 0 is read as black" in notes[0]


def test_five_real_patients_tell_left_from_right(real_root):
    """The border in `camus.examine` has room on both sides: 0 of 20 groups of five as they are, 19 mirrored."""
    rows = camus.select(camus.read_table(real_root), patients=100).itertuples()
    sides = np.array([camus._look(row)[3] for row in rows]).reshape(20, 5 * 2, 2).mean(2).sum(1)
    assert sides.min() > 0 and (sides > 4.5).sum() >= 19


def test_real_frames(real_root):
    table = camus.read_table(real_root)
    assert table.patient.nunique() == 450 and len(table) == 1800 and table.attrs["world"] == "camus"
    assert table.groupby("split").patient.nunique().to_dict() == {"training": 400, "validation": 50}
    assert table["lateral_mm"].isna().all() and not table["transposed"].any()
    native = camus.read_table(real_root / "native_4ch")
    assert np.allclose(native["depth_mm"], 0.308, atol=1e-3)
    image, mask = camus.read_frame(native.iloc[0])
    assert image.shape == mask.shape and image.shape[0] != image.shape[1]
