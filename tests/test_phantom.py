"""The phantom folder: reproducible, in CAMUS's layout, and anatomically what it says."""

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
from conftest import array

from diffecho_utils import DiffEchoError, camus, checks, phantom
from diffecho_utils.camus import CLASSES, PHASES, SPLITS, VIEWS, frame_path

SIDE = 96  # pixels: enough for areas and contrasts


def digests(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


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
    many = digests(folder)
    assert digests(phantom.write(tmp_path / "two", 4, seed=5, side=SIDE, processes=2)) == many
    few = digests(phantom.write(tmp_path / "few", 1, seed=5, side=SIDE, processes=1))
    other = digests(phantom.write(tmp_path / "other", 1, seed=6, side=SIDE, processes=1))
    of_one = [name for name in few if "database_nifti" in name]
    assert len(of_one) == 10
    assert all(few[name] == many[name] != other[name] for name in of_one)


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


def test_layout_types_and_header(folder):
    """As of any CAMUS folder, and what the files of the official one are."""
    assert checks.check(folder) == []
    table = camus.read_table(folder)
    assert len(table) == 16 and not table.transposed.any() and table.attrs["world"] == "phantom"
    for row in table.itertuples():
        (picture, mask), image, labels = (
            camus.read_frame(row),
            nib.load(row.image),
            array(row.label_map),
        )
        grey, (lateral, depth) = array(row.image), image.header.get_zooms()
        assert np.array_equal(picture, grey.T) and np.array_equal(mask, labels.T)
        assert camus.centre(mask == 1) < camus.centre(mask == 3), "apex up"
        assert grey.dtype == np.float32 and labels.dtype == np.uint8 and lateral == depth
        assert 90 < image.shape[1] * depth < 300, "sector depth in mm"
        assert np.allclose(image.affine, np.diag([-lateral, -depth, 1, 1]))
        assert np.array_equal(grey, np.rint(grey)) and grey.min() == 0 and 120 < grey.max() <= 255
        assert grey[0, 0] == grey[-1, 0] == 0, "the sector's tip is at the top, in the middle"
        assert set(np.unique(labels)) == {0, 1, 2, 3}
        assert row.image.read_bytes()[4:8] == bytes(4), "gzip time stamp"


def test_cfg_files_agree_with_the_contours(folder):
    for number in range(4):
        person = phantom.patient(5, number)
        diastolic, systolic = phantom.volumes(person)
        for view, v in person.views.items():
            text = (folder / "database_nifti" / person.name / f"Info_{view}.cfg").read_text()
            values = dict(re.findall(r"^(\w+): (\S+)$", text, re.M))
            assert list(values) == "ED ES NbFrame Sex Age ImageQuality EF FrameRate".split()
            assert values["ES"] == values["NbFrame"] and values["ImageQuality"] == v.quality
            assert int(values["EF"]) == round(100 * (1 - systolic / diastolic))


@pytest.mark.parametrize("patients", [1, 2, 3, 10, 60])
def test_splits_are_disjoint_and_complete(patients):
    splits = phantom._splits(patients, 0)
    assert sorted(splits) == [f"patient{n:04d}" for n in range(1, patients + 1)]
    assert set(splits.values()) == set(SPLITS[:patients]), "no list is empty"
    if patients >= 10:
        assert list(splits.values()).count("training") == 0.8 * patients


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


def test_every_ingredient_changes_the_picture_and_nothing_else(people):
    person = max(people, key=lambda p: p.views["4CH"].degradation)
    whole, mask, _ = phantom.frame(person, "4CH", "ED", side=SIDE)
    for name in phantom.INGREDIENTS:
        rest = [other for other in phantom.INGREDIENTS if other != name]
        image, same, _ = phantom.frame(person, "4CH", "ED", rest, SIDE)
        assert np.array_equal(mask, same)
        assert np.abs(image.astype(int) - whole)[whole > 0].mean() > 0.2, name
        assert name != "shadow" or np.all(whole <= image), "shadows only darken"


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
    people = [phantom.patient(1, index) for index in range(200)]
    assert people[4] == phantom.patient(1, 4) != people[5]
    views = [view for person in people for view in person.views.values()]
    kinds = {
        q: [v.degradation for v in views if v.quality == q] for q in ("Good", "Medium", "Poor")
    }
    good, medium, poor = kinds.values()
    assert max(good) < min(medium) < max(medium) < min(poor)
    assert 0.25 < len(good) / len(views) < 0.45


def test_ensure_writes_once_and_again_when_something_is_wrong(tmp_path, monkeypatch):
    write = functools.partial(phantom.write, side=SIDE, processes=1)
    written = mock.Mock(side_effect=write)
    monkeypatch.setattr(phantom, "write", written)
    monkeypatch.setattr(phantom, "SIDE", SIDE)
    root = tmp_path / "data" / "phantom"
    assert phantom.ensure(root, patients=2, seed=4) == root
    before = digests(root)
    phantom.ensure(root, patients=2, seed=4)
    assert written.call_count == 1
    frame_path(root, "patient0002", "4CH", "ES", mask=True).unlink()
    phantom.ensure(root, patients=2, seed=4)
    assert written.call_count == 2 and digests(root) == before, "a file was missing"
    phantom.ensure(root, patients=1, seed=4)
    assert json.loads((root / "dataset.json").read_text())["patients"] == 1
    monkeypatch.setattr(phantom, "VERSION", phantom.VERSION + 1)
    phantom.ensure(root, patients=1, seed=4)
    assert written.call_count == 4, "another version of the pictures"
    assert [path.name for path in root.parent.iterdir()] == ["phantom"], "no draft left behind"


@pytest.fixture
def old(tmp_path):
    """A phantom that another may take the place of."""
    return phantom.write(tmp_path / "phantom", patients=1, side=SIDE, processes=1)


@pytest.mark.filterwarnings("ignore:.*cancelled")
@pytest.mark.parametrize(
    "fault", ["interrupted, 1 process", "interrupted, 2", "cannot take its place"]
)
def test_after_a_fault_the_old_folder_is_there_and_no_draft(old, tmp_path, fault, monkeypatch):
    before, replace, interrupted = digests(old), os.replace, fault.startswith("interrupted")

    def refuse(source, target):
        if source.name == "new":
            raise PermissionError(13, "Permission denied", str(target))
        replace(source, target)

    def progress(*step):
        if interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", refuse)
    processes = 2 if fault.endswith("2") else 1
    with pytest.raises(KeyboardInterrupt if interrupted else PermissionError):
        phantom.write(old, 4, seed=9, side=SIDE, processes=processes, progress=progress)
    assert digests(old) == before and list(tmp_path.iterdir()) == [old]


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
    assert re.fullmatch(r"begin\n.*phantom, 20 patients\n.*end\n", done.stdout, re.S)
    assert done.stdout.count("begin") == 1 and not done.stderr
    assert [path.name for path in (tmp_path / "_build").iterdir()] == ["phantom-smoke"]


def test_two_processes_and_what_a_third_left(old, tmp_path, monkeypatch):
    """The other one is quicker between our two renames; a draft of a killed one goes after a day."""
    replace = os.replace
    for name, day in (("1", 0), ("2", 3)):
        left = tmp_path / f".phantom.phantom-{name}"
        (left / "new").mkdir(parents=True)
        os.utime(left, (time.time() - 86400 * day,) * 2)

    def overtaken(source, target):
        replace(source, target)
        if source == old and not old.exists():
            monkeypatch.setattr(os, "replace", replace)
            old.mkdir()
            (old / "dataset.json").write_text("the other's")

    monkeypatch.setattr(os, "replace", overtaken)
    phantom.write(old, patients=2, side=SIDE, processes=1)
    assert json.loads((old / "dataset.json").read_text())["patients"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [".phantom.phantom-1", old.name]


def test_bad_arguments_say_what_to_do(tmp_path, people):
    (tmp_path / "letters.txt").write_text("dear reader")
    for call, words in (
        (lambda: phantom.write(tmp_path / "none", patients=0), "at least 1"),
        (lambda: phantom.write(tmp_path, patients=1), "empty folder"),
        (lambda: phantom.frame(people[0], "3CH", "ED"), "3CH"),
        (lambda: phantom.frame(people[0], "2CH", "ED", ("speckel",)), "speckel"),
    ):
        with pytest.raises(DiffEchoError, match=words):
            call()
    assert (tmp_path / "letters.txt").exists()


def test_label_areas_are_those_of_real_frames(masks, real_root):
    """Mean area share of each label: within one standard deviation of the real mean."""
    patients = sorted(path.name for path in (real_root / "database_nifti").iterdir())[::6]
    for view, phase in CLASSES:
        real = [array(frame_path(real_root, p, view, phase, mask=True)) for p in patients]
        for label in (1, 2, 3):
            shares = [share(mask, label) for mask in real]
            ours = np.mean([share(mask, label) for mask in masks[view, phase]])
            assert abs(ours - np.mean(shares)) < np.std(shares), (view, phase, label)
