"""experiments/run.py: rows that are kept, that others cannot take, and one experiment from end to end."""

import importlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffecho_utils import assets, camus, checkpoints, models, results, training

CHECKOUT = Path(__file__).resolve().parents[1]
EXPERIMENTS = {path.stem for path in (CHECKOUT / "experiments").glob("*.py")}
EXPERIMENTS = sorted(EXPERIMENTS - {"run", "world", "golden"})
TOY = """
import os, signal, time
from pathlib import Path

SEEDS, SPLIT, LOG = [], None, Path(__file__).with_name("log")


def rows(world, scale=1, given=Path("none")):
    return {f"row {i}": {"i": i, "scale": scale, "given": given, "seed": i} for i in range(4)}


def compute(world, i, scale, given, seed):
    with LOG.open("a") as log:
        log.write(f"{i}")
    time.sleep(float(os.environ.get("PAUSE", 0)))
    if str(i) == os.environ.get("DIE_IN"):
        os.kill(os.getpid(), signal.SIGKILL)
    return {"value": i * scale / 3}


def collect(world, found):
    return {"toy": {row: values["value"] for row, values in found.items()}}
"""


@pytest.fixture
def run(tmp_path, monkeypatch, phantom_root):
    """`run(NAME, ...)`: `run.main` on the phantom, in a checkout of its own with an experiment `toy`."""
    (tmp_path / "_toc.yml").touch()
    (tmp_path / "data").symlink_to(CHECKOUT / "data")
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setenv("DIFFECHO_ROOT", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{CHECKOUT}")
    monkeypatch.syspath_prepend(CHECKOUT / "experiments")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy", raising=False)
    shared = ["--data", phantom_root, "--profile", "smoke", "--out", tmp_path / "out"]
    program = importlib.import_module("run")
    return lambda name, *words: program.main([name, *shared, *words])


def test_killed_and_repeated(run, tmp_path, phantom_root, capsys):
    log, out = tmp_path / "log", tmp_path / "out"
    command = [sys.executable, CHECKOUT / "experiments" / "run.py", "toy", "--data", phantom_root]
    killed = subprocess.run(command, env=os.environ | {"DIE_IN": "2"})
    assert killed.returncode == -9 and log.read_text() == "012"
    assert run("toy", "--profile", "cpu") == 0  # goes on, and nobody holds the row
    assert log.read_text() == "01223"
    record = results.load(out / "toy.json")
    assert record["values"] == {f"row {i}": pytest.approx(i / 3, rel=1e-5) for i in range(4)}
    assert record["world"] == "phantom" and record["seeds"] == [0, 1, 2, 3]
    assert str(phantom_root) not in record["command"] and "run.py toy" in record["command"]
    assert run("toy", "--profile", "cpu") == 0 and log.read_text() == "01223"
    rows = sorted((assets.workspace() / "experiments" / "toy").glob("*.json"))
    assert results.load(rows[1])["seeds"] == [1] and results.load(rows[1])["values"]["seconds"] >= 0

    # Rows of another profile, other settings, or another file of the same name are other rows
    given = tmp_path / "given"
    given.write_text("one")
    for words, computed in (
        (["--scale", 2, "--only", "1|3"], "13"),
        (["--scale", 2], "02"),
        (["--scale", 2], ""),
        (["--scale", 2, "--only", "2", "--again"], "2"),
        (["--scale", 2, "--given", given], "0123"),
    ):
        log.write_text("")
        assert run("toy", *words) == 0 and log.read_text() == computed, words
    given.write_text("two")
    sys.modules["run"].opened.cache_clear()  # as in another process
    assert run("toy", "--scale", 2, "--given", given) == 0 and log.read_text() == "01230123"
    assert "2 of 4 rows are not there yet (first: row 0)" in capsys.readouterr().out
    assert run("no_such", "--scale", 2) == 1
    assert "no such experiment; there are strength" in capsys.readouterr().err


def test_two_at_once_and_a_zip(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PAUSE", "0.3")
    assert run("toy", "--processes", 2) == 0
    assert sorted((tmp_path / "log").read_text()) == [*"0123"]
    monkeypatch.delattr(sys.modules["toy"], "collect")
    assert run("toy") == 0
    with zipfile.ZipFile(tmp_path / "out" / "toy.zip") as archive:
        assert archive.namelist() == [f"row_{i}.json" for i in range(4)]
        assert results.parse(archive.read("row_1.json"), "row_1")["values"]["value"] == 0.333333


def test_an_experiment_from_end_to_end(run, tmp_path, monkeypatch):
    strength = importlib.import_module("strength")
    monkeypatch.setattr(strength, "DIALS", {"sdm": (1.0, 3.0)})
    assert run("strength", "--frames", 4) == 0
    shipped = results.load(assets.record("camus", "cpu", "strength"))
    record = results.load(tmp_path / "out" / "strength.json")
    assert record.keys() == shipped.keys() and record["values"].keys() == shipped["values"].keys()
    dials, model = record["values"]["dials"]["sdm"], shipped["values"]["dials"]["sdm"]
    assert record["values"]["frames"] == 4 and record["values"]["chosen"]["sdm"] in (1.0, 3.0)
    assert dials["1.0"].keys() == dials["3.0"].keys() == model["1.0"].keys()
    assert dials["1.0"]["dice"].keys() == model["1.0"]["dice"].keys()


def test_few_steps_of_the_student_beside_the_teachers(run, tmp_path, monkeypatch):
    """Its record at the size of moments has what the shipped one has, and tells blur from speckle."""
    experiment = importlib.import_module("few_steps")
    brief = {name: (steps[-1:], small) for name, (steps, small) in experiment.ROWS.items()}
    monkeypatch.setattr(experiment, "ROWS", brief)
    monkeypatch.setattr(experiment, "SEEDS", (1000,))
    assert run("few_steps", "--frames", 8) == 0
    record = results.load(tmp_path / "out" / "few_steps.json")["values"]
    shipped = results.load(assets.record("camus", "cpu", "few_steps"))["values"]
    assert record["real"].keys() == shipped["real"].keys()
    assert set(record["drawn"]) == {f"{name}, 1" for name in brief} < set(shipped["drawn"])
    for name, row in record["drawn"].items():
        assert row.keys() == shipped["drawn"][name].keys()
    blurred, sharp = (record["drawn"][f"{name}, 1"]["detail"][0] for name in ("SDM", "student"))
    assert blurred < 0.9 * sharp


@pytest.mark.parametrize("step", [1, 2, 8])
def test_thinned_frames_keep_every_class(run, frames, step):
    thinned = importlib.import_module("world").thinned
    kept = frames.where(thinned(frames, step))
    assert kept.table["patient"].nunique() == -(-frames.table["patient"].nunique() // step)
    assert len(set(np.bincount(kept.classes))) == 1


def test_dials_of_the_phase_reach_the_generator(run, tmp_path, monkeypatch):
    phase = importlib.import_module("phase")
    rows = (
        "as shipped",
        "words of the other phase",
        "words without the phase",
        "guided against no words",
        "not guided",
        "strength 1.8",
    )
    monkeypatch.setattr(phase, "CHANGES", {name: phase.CHANGES[name] for name in rows})
    monkeypatch.setattr(phase, "SEEDS", (1000,))
    assert run("phase", "--frames", 4) == 0
    record = results.load(tmp_path / "out" / "phase.json")["values"]
    distances = {row["distance"][0] for row in record["drawn"].values()}
    assert record["frames"] >= 4 and len(distances) == len(rows), "each dial changes the pictures"
    shipped = record["drawn"]["as shipped"]["dials"]
    assert record["drawn"]["strength 1.8"]["dials"] == shipped | {"strength": 1.8}
    assert all(0 <= row["phase"][0] <= 1 for row in record["drawn"].values())


def test_distances_by_number_have_the_slope_of_their_generator(monkeypatch):
    """Of two sets with the mean and spread of the training frames, by the theory of covariances."""
    rng, classes = np.random.default_rng(0), torch.arange(200) % 4
    known, sets = rng.normal(size=(20000, 10)), rng.normal(size=(20, 200, 10))
    world = SimpleNamespace(
        see={"as it is": lambda images: images},
        seen=lambda encoder, split: known,
        frames=lambda split: SimpleNamespace(classes=classes),
    )
    monkeypatch.syspath_prepend(CHECKOUT / "experiments")
    by_number = importlib.import_module("generators").by_number
    found = [by_number(world, "as it is", x) for x in sets]
    assert list(found[0]) == ["40", "80", "120", "160", "200"]
    slope, start = np.polyfit(
        1 / np.arange(40, 201, 40), np.mean([[*f.values()] for f in found], 0), 1
    )
    # mean: D / N; covariance: a quarter of its squared error, D (D + 1) / 4N
    assert slope == pytest.approx(10 + 110 / 4, rel=0.15) and abs(start) < 0.05


def test_memorisation_finds_what_was_planted(run, tmp_path, monkeypatch):
    memorisation = importlib.import_module("memorisation")
    monkeypatch.setattr(memorisation, "SEEDS", (1000,))
    monkeypatch.setattr(memorisation, "STARTS", (300,))
    monkeypatch.setattr(memorisation, "LEARNED", 2)
    assert run("memorisation", "--profile", "smoke") == 0
    found = results.load(tmp_path / "out" / "memorisation.json")["values"]
    for planted in (
        found["real"]["noise 0.05"],
        *(found[m]["begun"]["300"] for m in models.GENERATORS),
    ):
        assert planted["share"][0] == 1 and planted["n"] >= 20
    assert found["real"]["held out"]["suspects"] <= 1
    for model in models.GENERATORS:
        of = found[model]
        assert of["drawn"]["n"] == len(of["drawn"]["ratios"])
        low, high = of["membership"]["auc"]["by class"][1:]
        assert 0 <= low <= high <= 1
        assert ("training maps" in of) == (model in ("text-seg", "sdm"))


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("recipes", ["--steps", 1], ["texture", *camus.CLASS_NAMES, "text-seg"]),
        ("training_speed", ["--steps", 1, "--repeats", 1], ["usual", "text-seg"]),
        ("phantom_speed", ["--patients", 2, "--cores", 1], ["ms/frame"]),
    ],
)
def test_speeds(run, capsys, name, words, told):
    assert run(name, *words) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in told) and "error" not in out and "NaN" not in out


def test_one_command_trains_everything_on_equally_many_images(run, tmp_path, capsys):
    words = ["trainings", "--images", 64, "--batch", 8]
    for only in ("autoencoder|clip", ""):  # a killed command goes on
        assert run(*words, "--only", only) == 0
    assert "sdm" in capsys.readouterr().out
    (folder,) = (assets.workspace() / "trainings").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == sorted(training.MODELS)
    spent = {name: checkpoints.budget(folder / name) for name in models.GENERATORS}
    assert {of["images"] for of in spent.values()} == {64} and spent["text-seg"]["before"] == 64
    assert checkpoints.load_generator(folder / "text-seg").model == "text-seg"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_says_what_it_is(run, name):
    program = sys.modules["run"]
    assert name in f"{program.RECORDS} {program.SPEEDS}".split()
    with pytest.raises(SystemExit, match="0"):
        run(name, "--help")
