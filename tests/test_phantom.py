"""The phantom folder: reproducible, in CAMUS's layout, and anatomically what it says."""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from diffecho_utils import DiffEchoError, camus, phantom
from diffecho_utils.camus import CLASSES, PHASES, SPLITS, VIEWS, frame_path

REAL = Path(__file__).resolve().parents[2] / "shared" / "camus"
SIDE = 96  # pixels: enough for areas and contrasts


def digests(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def array(path):
    return np.asarray(nib.load(path).dataobj)


def share(mask, label):
    return np.mean(mask == label)


@pytest.fixture(scope="module")
def people():
    return [phantom.patient(3, index) for index in range(24)]


@pytest.fixture(scope="module")
def masks(people):
    """Label maps of all of `people`: {(view, phase): [mask, ...]}."""
    return {
        (view, phase): [phantom.frame(p, view, phase, (), SIDE)[1] for p in people]
        for view, phase in CLASSES
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom") / "four"
    return phantom.write(root, patients=4, seed=5, side=SIDE, processes=1)


def test_same_seed_same_bytes_whatever_the_number_of_processes(folder, tmp_path):
    two = phantom.write(tmp_path / "two", patients=4, seed=5, side=SIDE, processes=2)
    assert digests(two) == digests(folder)


def test_same_bytes_whatever_the_processor():
    """With OpenBLAS's routines for an old processor too: what they round differently must not show."""
    code = (
        "import hashlib; from diffecho_utils import phantom as p;"
        "frames = [p.frame(p.patient(9, i), v, 'ES')[0] for i in range(2) for v in p.VIEWS];"
        "print([hashlib.sha256(frame.tobytes()).hexdigest() for frame in frames])"
    )
    python = [sys.executable, "-c", code]
    here = subprocess.run(python, capture_output=True, check=True)
    old = os.environ | {"OPENBLAS_CORETYPE": "Nehalem"}
    assert subprocess.run(python, capture_output=True, check=True, env=old).stdout == here.stdout


def test_patients_differ_by_seed_and_not_by_how_many_there_are(folder, tmp_path):
    few = digests(phantom.write(tmp_path / "few", patients=1, seed=5, side=SIDE, processes=1))
    other = digests(phantom.write(tmp_path / "other", patients=1, seed=6, side=SIDE, processes=1))
    many = digests(folder)
    of_one = [name for name in few if "database_nifti" in name]
    assert len(of_one) == 10
    assert all(few[name] == many[name] != other[name] for name in of_one)


def test_layout_types_and_header(folder):
    for number in range(1, 5):
        for view, phase in CLASSES:
            path = frame_path(folder, f"patient{number:04d}", view, phase)
            image = nib.load(path)
            mask = nib.load(frame_path(folder, f"patient{number:04d}", view, phase, mask=True))
            spacing = image.header.get_zooms()
            assert image.get_data_dtype() == np.float32
            assert mask.get_data_dtype() == np.uint8
            assert image.shape == mask.shape
            assert spacing[0] == spacing[1]
            assert 90 < image.shape[1] * spacing[1] < 300, "sector depth in mm"
            assert np.allclose(image.affine, np.diag([-spacing[0], -spacing[1], 1, 1]))
            grey, labels = np.asarray(image.dataobj), np.asarray(mask.dataobj)
            assert np.array_equal(grey, np.rint(grey))
            assert grey.min() == 0
            assert 120 < grey.max() <= 255
            assert grey[0, 0] == grey[-1, 0] == 0, "the sector's tip is at the top, in the middle"
            assert set(np.unique(labels)) == {0, 1, 2, 3}
            assert path.read_bytes()[4:8] == bytes(4), "gzip time stamp"


def test_the_package_reads_the_folder_as_any_camus_folder(folder):
    assert camus.check(folder) == []
    table = camus.read_table(folder)
    assert len(table) == 16
    assert not table.transposed.any()
    image, mask = camus.read_frame(table.iloc[0])
    assert np.array_equal(image, array(table.image[0]).T)
    assert np.argwhere(mask == 1)[:, 0].mean() < np.argwhere(mask == 3)[:, 0].mean(), "apex up"
    assert table.attrs["world"] == "phantom"


def test_cfg_files_agree_with_the_contours(folder):
    for number in range(4):
        person = phantom.patient(5, number)
        diastolic, systolic = phantom.volumes(person)
        for view, v in person.views.items():
            text = (folder / "database_nifti" / person.name / f"Info_{view}.cfg").read_text()
            values = dict(
                re.fullmatch(r"(\w+): (\S+)", line).groups() for line in text.splitlines()
            )
            assert list(values) == "ED ES NbFrame Sex Age ImageQuality EF FrameRate".split()
            assert values["ES"] == values["NbFrame"]
            assert values["ImageQuality"] == v.quality
            assert int(values["EF"]) == round(100 * (1 - systolic / diastolic))


def test_half_sequences_start_and_end_at_the_frames(tmp_path):
    root = phantom.write(tmp_path / "film", 1, side=64, half_sequences=True, processes=1)
    for view in VIEWS:
        stem = root / "database_nifti" / "patient0001" / f"patient0001_{view}_half_sequence"
        film, labels = array(f"{stem}.nii.gz"), array(f"{stem}_gt.nii.gz")
        first, last = (array(frame_path(root, "patient0001", view, phase)) for phase in PHASES)
        count = phantom.patient(0, 0).views[view].frames
        assert film.shape == labels.shape == (*first.shape, count)
        assert np.array_equal(film[..., 0], first)
        assert np.array_equal(film[..., -1], last)
        areas = (labels == 1).sum((0, 1))
        assert np.all(np.diff(areas) <= 0), "the ventricle empties from frame to frame"


@pytest.mark.parametrize("patients", [1, 2, 3, 10, 60])
def test_splits_are_disjoint_and_complete(tmp_path, patients):
    phantom._write_splits(tmp_path, patients, 0)
    files = {split: tmp_path / "database_split" / f"subgroup_{split}.txt" for split in SPLITS}
    lists = {split: path.read_text().split() for split, path in files.items() if path.exists()}
    assert sorted(sum(lists.values(), [])) == [f"patient{n:04d}" for n in range(1, patients + 1)]
    assert list(lists) == list(SPLITS[:patients]), "no list is empty: `check` would refuse it"
    assert all(lists.values())
    if patients >= 10:
        assert len(lists["training"]) == 0.8 * patients


def test_the_heart_beats(people, masks):
    for view in VIEWS:
        pairs = list(zip(masks[view, "ED"], masks[view, "ES"], strict=True))
        assert all(share(es, 1) < share(ed, 1) for ed, es in pairs)
        assert np.mean([share(es, 3) > share(ed, 3) for ed, es in pairs]) > 0.8
        hearts = [[phantom._heart(p, p.views[view], beat) for beat in (0, 1)] for p in people]
        walls = np.array([[_wall_mm(heart) for heart in pair] for pair in hearts])
        assert np.all((walls > 5) & (walls < 40))
        assert 1.05 < np.median(walls[:, 1] / walls[:, 0]) < 1.4, "walls thicken"


def _wall_mm(heart):
    """Mean wall thickness over the apical half of the contours."""
    angle = np.linspace(-1.5, 1.5, 61)
    return np.mean(np.interp(angle, *heart.outer) - np.interp(angle, *heart.inner))


def test_volumes_are_physiological():
    volumes = np.array([phantom.volumes(phantom.patient(0, index)) for index in range(120)])
    fractions = 1 - volumes[:, 1] / volumes[:, 0]
    assert np.all((fractions > 0.1) & (fractions < 0.8))
    assert 0.15 < np.mean(fractions <= 0.45) < 0.4
    assert 80 < np.median(volumes[:, 0]) < 180


def test_label_maps_hold_the_volume_that_the_cfg_states(people, masks):
    """Area-length volumes of the label maps shrink as the contours' biplane volumes do."""
    for number, person in enumerate(people):
        products = [
            share(masks["2CH", p][number], 1) * share(masks["4CH", p][number], 1) for p in PHASES
        ]
        lengths = [phantom._heart(person, person.views["2CH"], beat).length for beat in (0, 1)]
        diastolic, systolic = phantom.volumes(person)
        measured = 1 - products[1] / products[0] * lengths[0] / lengths[1]
        assert abs(measured - (1 - systolic / diastolic)) < 0.06


def test_the_four_chamber_view_shows_the_right_heart(people):
    """Just left of the septum lies dark blood; left of the two-chamber view's wall lies tissue."""
    contrast = {view: [] for view in VIEWS}
    for person in people[:16]:
        for view in VIEWS:
            image, mask, spacing = phantom.frame(person, view, "ED", ("clutter",), SIDE)
            cavity = np.argwhere(mask == 1)[:, 1]
            row = round(0.3 * cavity.min() + 0.7 * cavity.max())
            edge = np.argwhere(mask[:, row] == 2).min()
            beside = image[max(edge - round(12 / spacing), 0) : edge - round(4 / spacing), row]
            if beside.size and beside.min() > 0:  # within the sector
                septum = image[:, row][mask[:, row] == 2]
                contrast[view].append(np.median(septum) - np.median(beside))
    assert min(len(values) for values in contrast.values()) >= 6
    assert np.median(contrast["4CH"]) > np.median(contrast["2CH"]) + 40


def test_every_ingredient_changes_the_picture_and_not_the_labels(people):
    whole, mask, _ = phantom.frame(people[0], "4CH", "ED", side=SIDE)
    for name in phantom.INGREDIENTS:
        rest = [other for other in phantom.INGREDIENTS if other != name]
        image, same, _ = phantom.frame(people[0], "4CH", "ED", rest, SIDE)
        assert np.array_equal(mask, same)
        assert np.abs(image.astype(int) - whole)[whole > 0].mean() > 0.2, name


def test_leaving_out_an_ingredient_changes_nothing_else(people):
    person = max(people, key=lambda p: p.views["2CH"].degradation)
    whole, _, _ = phantom.frame(person, "2CH", "ED", side=SIDE)
    rest = [name for name in phantom.INGREDIENTS if name != "shadow"]
    assert np.all(whole <= phantom.frame(person, "2CH", "ED", rest, SIDE)[0]), "shadows only darken"


def test_phases_share_the_sector_and_the_view_but_not_the_scatterers(people):
    (ed, ed_mask, spacing), (es, es_mask, same) = (
        phantom.frame(people[1], "4CH", phase, side=SIDE) for phase in PHASES
    )
    assert (ed.shape, spacing) == (es.shape, same)
    cavity = (ed_mask == 1) & (es_mask == 1)
    assert np.corrcoef(ed[cavity], es[cavity])[0, 1] < 0.99
    outside = (ed_mask == 0) & (es_mask == 0) & (ed > 0) & (es > 0)
    assert np.corrcoef(ed[outside], es[outside])[0, 1] > 0.5


def test_quality_is_tied_to_degradation():
    views = [v for index in range(200) for v in phantom.patient(1, index).views.values()]
    good, medium, poor = (
        [v.degradation for v in views if v.quality == q] for q in ("Good", "Medium", "Poor")
    )
    assert max(good) < min(medium) < max(medium) < min(poor)
    assert 0.25 < len(good) / len(views) < 0.45


def test_patients_are_plain_values(people):
    assert people[4] == phantom.patient(3, 4) != people[5]
    with pytest.raises(dataclasses.FrozenInstanceError):
        people[4].length = 1.0


def test_ensure_writes_once_and_again_when_something_is_wrong(tmp_path, monkeypatch):
    written = []
    real_write = phantom.write

    def counted(*args, **kwargs):
        written.append(args)
        return real_write(*args, side=SIDE, processes=1, **kwargs)

    monkeypatch.setattr(phantom, "write", counted)
    monkeypatch.setattr(phantom, "SIDE", SIDE)
    root = tmp_path / "data" / "phantom"
    assert phantom.ensure(root, patients=2, seed=4) == root
    before = digests(root)
    phantom.ensure(root, patients=2, seed=4)
    assert len(written) == 1
    frame_path(root, "patient0002", "4CH", "ES", mask=True).unlink()
    phantom.ensure(root, patients=2, seed=4)
    assert len(written) == 2, "a folder with a file missing is written again"
    assert digests(root) == before
    phantom.ensure(root, patients=1, seed=4)
    assert json.loads((root / "dataset.json").read_text())["patients"] == 1
    monkeypatch.setattr(phantom, "VERSION", phantom.VERSION + 1)
    phantom.ensure(root, patients=1, seed=4)
    assert len(written) == 4, "another version of the pictures"
    assert [path.name for path in root.parent.iterdir()] == ["phantom"], "no draft left behind"


@pytest.mark.filterwarnings("ignore:.*cancelled")
@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupted_write_leaves_the_old_folder_and_no_draft(tmp_path, processes):
    root = phantom.write(tmp_path / "phantom", patients=1, side=SIDE, processes=1)
    before = digests(root)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        phantom.write(root, 4, seed=9, side=SIDE, processes=processes, progress=interrupt)
    assert digests(root) == before
    assert list(tmp_path.iterdir()) == [root]


def test_a_plain_script_needs_no_main_guard(tmp_path):
    """Spawned processes would run the script again, each the same, for ever."""
    script = tmp_path / "script.py"
    script.write_text(
        "print('begin')\nfrom diffecho_utils import chapter\n"
        "chapter.begin('smoke', '')\nprint('end')\n"
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "_toc.yml").touch()
    python = [sys.executable, script]
    environment = os.environ | {"DIFFECHO_ROOT": str(tmp_path)}
    done = subprocess.run(python, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line in ("begin", "end")] == [
        "begin",
        "end",
    ]
    assert "phantom, 20 patients" in done.stdout and not done.stderr
    assert [path.name for path in (tmp_path / "_build").iterdir()] == ["phantom-smoke"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    root = phantom.write(tmp_path / "phantom", patients=1, side=SIDE, processes=1)
    before, replace = digests(root), os.replace

    def refuse(source, target):
        if source.name == "new":
            raise PermissionError(13, "Permission denied", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        phantom.write(root, patients=2, side=SIDE, processes=1)
    assert digests(root) == before
    assert list(tmp_path.iterdir()) == [root]


def test_two_processes_may_write_the_same_folder(tmp_path, monkeypatch):
    """The other one is quicker between our two renames."""
    root, replace = tmp_path / "phantom", os.replace
    phantom.write(root, patients=1, side=SIDE, processes=1)

    def overtaken(source, target):
        replace(source, target)
        if source == root and not root.exists():
            monkeypatch.setattr(os, "replace", replace)
            root.mkdir()
            (root / "dataset.json").write_text("the other's")

    monkeypatch.setattr(os, "replace", overtaken)
    phantom.write(root, patients=2, side=SIDE, processes=1)
    assert json.loads((root / "dataset.json").read_text())["patients"] == 2
    assert list(tmp_path.iterdir()) == [root]


def test_what_a_killed_process_left_goes_after_a_day(tmp_path):
    for name, day in (("1", 0), ("2", 3)):
        left = tmp_path / f".phantom.phantom-{name}"
        (left / "new").mkdir(parents=True)
        os.utime(left, (time.time() - 86400 * day,) * 2)
    root = phantom.write(tmp_path / "phantom", patients=1, side=SIDE, processes=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".phantom.phantom-1", root.name]


def test_bad_arguments_say_what_to_do(tmp_path, people):
    with pytest.raises(DiffEchoError, match="at least 1"):
        phantom.write(tmp_path / "none", patients=0)
    (tmp_path / "letters.txt").write_text("dear reader")
    with pytest.raises(DiffEchoError, match="empty folder"):
        phantom.write(tmp_path, patients=1)
    assert (tmp_path / "letters.txt").exists()
    with pytest.raises(DiffEchoError, match="3CH"):
        phantom.frame(people[0], "3CH", "ED")
    with pytest.raises(DiffEchoError, match="speckel"):
        phantom.frame(people[0], "2CH", "ED", ("speckel",))


@pytest.mark.skipif(not REAL.is_dir(), reason="real CAMUS frames (../shared/camus) are not here")
def test_label_areas_are_those_of_real_frames(masks):
    """Mean area share of each label: within one standard deviation of the real mean."""
    patients = sorted(path.name for path in (REAL / "database_nifti").iterdir())[::6]
    for view, phase in CLASSES:
        real = [array(frame_path(REAL, p, view, phase, mask=True)) for p in patients]
        for label in (1, 2, 3):
            shares = [share(mask, label) for mask in real]
            ours = np.mean([share(mask, label) for mask in masks[view, phase]])
            assert abs(ours - np.mean(shares)) < np.std(shares), (view, phase, label)
