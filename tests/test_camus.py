"""The folder becomes a table; whatever is wrong with it is named, with the path and a remedy."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from conftest import array

from diffecho_utils import DiffEchoError, camus, checks
from diffecho_utils.__main__ import main


def test_table_has_every_frame_with_its_facts(phantom_root):
    table = camus.read_table(phantom_root)
    assert len(table) == 40 and table.attrs["world"] == "phantom"
    assert set(zip(table["view"], table["phase"], strict=True)) == set(camus.CLASSES)
    assert table["split"].notna().all() and (table.groupby("patient")["split"].nunique() == 1).all()
    assert table["lateral_mm"].between(0.1, 1.5).all() and table["ef"].between(5, 85).all()
    assert table["quality"].isin(["Good", "Medium", "Poor"]).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int16])
def test_number_type_does_not_matter_and_placeholder_spacing_is_unknown(broken_root, dtype):
    row = next(camus.read_table(broken_root).itertuples())
    before, _ = camus.read_frame(row)
    camus.write_nifti(row.image, array(row.image).astype(dtype), 1.0, 1.0)
    np.testing.assert_array_equal(camus.read_frame(row)[0], before)
    assert camus.read_table(broken_root)["lateral_mm"].isna().sum() == 1


def test_a_cfg_may_be_an_older_one_or_missing(broken_root):
    folder = broken_root / "database_nifti" / "patient0001"
    (folder / "Info_2CH.cfg").write_text("LVedv: 94.0\nLVesv: 43.2\nLVef: 54\nImageQuality: Good\n")
    (folder / "Info_4CH.cfg").unlink()
    facts = camus.read_table(broken_root).set_index(["patient", "view"])
    assert (facts.loc[("patient0001", "2CH"), "ef"] == 54).all()
    assert facts.loc[("patient0001", "4CH"), "ef"].isna().all()


def test_wrong_level_is_named_with_the_folder_to_pass(phantom_root, tmp_path):
    patients = phantom_root / "database_nifti"
    for folder, words in (
        (phantom_root.parent, f"one level too high; pass {phantom_root}"),
        (patients, f"one level too low; pass {phantom_root}"),
        (patients / "patient0001", f"two levels too low; pass {phantom_root}"),
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path, "no database_nifti/ in it"),
    ):
        with pytest.raises(DiffEchoError, match=words):
            camus.read_table(folder)
    (tmp_path / "database_nifti").mkdir()
    with pytest.raises(DiffEchoError, match="no patientNNNN folder"):
        camus.read_table(tmp_path)
    (tmp_path / "database_nifti" / "patient0001").mkdir()
    with pytest.raises(DiffEchoError, match="no patientNNNN_{2CH,4CH}_{ED,ES}.nii.gz"):
        camus.read_table(tmp_path)


def damage(root):
    """Every kind of damage at once: {path that must be named: words of the problem}."""
    frames = [
        camus.frame_path(root, f"patient{i:04d}", "2CH", "ED", i in (1, 4, 5)) for i in range(7)
    ]
    _, lost_mask, lost_frame, truncated, seven, shape, sequence = frames
    lost_mask.unlink()
    lost_frame.unlink()
    truncated.write_bytes(truncated.read_bytes()[:900])
    mask = array(seven).copy()
    mask[0, 0] = 7
    camus.write_nifti(seven, mask, 0.308, 0.308)
    camus.write_nifti(shape, np.zeros((20, 30), np.uint8), 0.308, 0.308)
    camus.write_nifti(sequence, np.zeros((20, 30, 9), np.float32), 0.308, 0.308)
    cfg = root / "database_nifti" / "patient0007" / "Info_2CH.cfg"
    cfg.write_bytes(b"\xff\xfe\x00 nonsense")
    trained, empty, twice = (
        root / "database_split" / f"subgroup_{s}.txt" for s in ("training", "testing", "validation")
    )
    empty.write_text("\n")
    name = trained.read_text().split()[0]
    twice.write_text(f"{twice.read_text()}\n{name}\n")
    return {
        lost_mask: "missing beside",
        lost_frame: "missing beside",
        truncated: "unreadable",
        seven: r"labels \[7",
        shape: r"shape \(20, 30\) differs",
        sequence: "half sequence",
        cfg: "not a cfg",
        empty: "empty list",
        twice: f"{name} is in training too",
    }


def test_all_damage_is_listed_at_once(broken_root, phantom_root, capsys):
    assert main(["check", str(phantom_root)]) == 0
    assert "all usable" in capsys.readouterr().out
    expected = damage(broken_root)
    assert main(["check", str(broken_root), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    problems = checks.check(broken_root)
    assert not report["usable"] and len(report["problems"]) == len(problems) == len(expected)
    for path, words in expected.items():
        line = [p for p in problems if p.startswith(f"{path}: ")]
        assert len(line) == 1 and re.search(words, line[0]), (path, line)
        assert re.search(r"[;,] (copy|restore|a |take|and|or|delete|use)", line[0]), line
    with pytest.raises(DiffEchoError, match="python -m diffecho_utils check"):
        camus.read_table(broken_root)
    assert main(["check", str(broken_root / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().out


def splits_of(table):
    assert (table.groupby("patient")["split"].nunique(dropna=False) == 1).all()
    return table.groupby("patient")["split"].first()


def test_folds_of_the_release_s_lists(broken_root):
    """`subGroupN_testing.txt` and its like, as the older release has them."""
    table = camus.read_table(broken_root)
    (broken_root / "listSubGroups").mkdir()
    names = list(table["patient"].unique())
    parts = {"testing": names[4:5], "validation": names[5:6], "training": names[:4] + names[6:9]}
    for split, chosen in parts.items():
        path = broken_root / "listSubGroups" / f"subGroup5_{split}.txt"
        path.write_text("\n".join(chosen))
    fold = splits_of(camus.by_fold(table, 5))
    assert {split: list(fold.index[fold == split]) for split in parts} == parts
    assert pd.isna(fold[names[9]]), "in no list"
    path.write_text("\n".join(names))
    with pytest.raises(DiffEchoError, match="patient0005 is in training too"):
        camus.by_fold(table, 5)
    path.unlink()
    with pytest.raises(DiffEchoError, match="no subgroup5_training.txt; restore it"):
        camus.by_fold(table, 5)
    for number in (0, 11):
        with pytest.raises(
            DiffEchoError, match=f"no fold {number} of 10 patients; ask for 1 to 10"
        ):
            camus.by_fold(table, number)
    with pytest.raises(DiffEchoError, match="no fold 1 of 9 patients"):
        camus.by_fold(table[table["patient"] != "patient0001"], 1)


def test_dealt_folds_partition_the_patients_and_are_stratified():
    rng = np.random.default_rng(0)
    names = [f"patient{i:04d}" for i in range(1, 98)]
    ef = pd.Series(rng.uniform(15, 75, 97), names)
    worst = pd.Series(rng.choice(["Good", "Medium", "Poor"], 97, p=[0.35, 0.46, 0.19]), names)
    rows = [(who, v, p, ef[who], worst[who]) for who in names for v, p in camus.CLASSES]
    table = pd.DataFrame(rows, columns=["patient", "view", "phase", "ef", "quality"])
    table.loc[table["view"] == "4CH", "quality"] = "Good"  # the better view of each patient
    table.attrs["root"] = "nowhere"
    splits = pd.DataFrame({n: splits_of(camus.by_fold(table, n)) for n in range(1, 11)})
    assert all((splits == part).sum(axis=1).eq(1).all() for part in ("testing", "validation"))
    assert all(
        ((splits[n] == "validation") == (splits[n % 10 + 1] == "testing")).all() for n in splits
    )
    fold = (splits == "testing").idxmax(axis=1)
    assert np.ptp(fold.value_counts()) <= 1
    for quality in ("Good", "Medium", "Poor"):
        counts = fold[worst == quality].value_counts().reindex(range(1, 11), fill_value=0)
        assert np.ptp(counts) <= 2, quality
    means = ef.groupby(fold).mean()
    shuffled = [fold.sample(frac=1, random_state=s).to_numpy() for s in range(50)]
    assert np.ptp(means) < np.median([np.ptp(ef.groupby(other).mean()) for other in shuffled])
    assert splits_of(camus.by_fold(table, 3)).equals(splits[3])
    assert not splits_of(camus.by_fold(table, 3, seed=1)).equals(splits[3])
    silent = table.assign(ef=np.nan, quality=None)
    assert splits_of(camus.by_fold(silent, 3)).value_counts()["testing"] in (9, 10)


def test_real_frames_have_nothing_to_report(real_root):
    problems, notes = checks.examine(real_root)
    assert problems == [] and len(notes) == 1 and "8-bit frames; 0 is read as black" in notes[0]


def test_five_real_patients_tell_left_from_right(real_root):
    """The border in `checks.examine` has room on both sides: 0 of 20 groups of five as they are, 19 mirrored."""
    rows = camus.select(camus.read_table(real_root), patients=100).itertuples()
    found = [checks._left_is_left(*camus.read_frame(row), row.view) for row in rows]
    sides = np.reshape(found, (20, 5 * 2, 2)).mean(2).sum(1)
    assert sides.min() > 0 and (sides > 4.5).sum() >= 19


def test_real_frames(real_root):
    table = camus.read_table(real_root)
    assert table.patient.nunique() == 450 and len(table) == 1800 and table.attrs["world"] == "camus"
    assert table.groupby("split").patient.nunique().to_dict() == {"training": 400, "validation": 50}
    assert table["lateral_mm"].isna().all() and not table["transposed"].any()
    fold = splits_of(camus.by_fold(table, 1)).value_counts().to_dict()
    assert fold == {"training": 360, "validation": 45, "testing": 45}
    native = camus.read_table(real_root / "native_4ch")
    assert np.allclose(native["depth_mm"], 0.308, atol=1e-3)
    image, mask = camus.read_frame(native.iloc[0])
    assert image.shape == mask.shape and image.shape[0] != image.shape[1]
