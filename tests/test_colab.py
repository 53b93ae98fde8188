"""The chapters as on Colab: the installed wheel, an empty folder, no repository, assets over the network."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def served(serve):
    """Address of a server of the checkout's data/, in place of the repository's."""
    with serve(ROOT / "data") as address:
        yield address


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A fresh environment with the wheel; other packages are there already, as on Colab."""
    folder = tmp_path_factory.mktemp("colab")
    build = "import sys; from flit_core import buildapi; print(buildapi.build_wheel(sys.argv[1]))"
    made = [sys.executable, "-c", build, folder]
    wheel = subprocess.run(
        made, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "already_there.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    options = ["install", "--quiet", "--no-index", "--no-deps", folder / wheel]
    subprocess.run([*pip, *options], check=True, env=clean())
    return python


@pytest.fixture(scope="module")
def colab(tmp_path_factory, python, served):
    """Runs a command of the environment in an empty folder that all chapters share."""
    place = tmp_path_factory.mktemp("content")
    environment = clean() | {
        "DIFFECHO_DATA_URL": served,
        "DIFFECHO_CACHE": str(tmp_path_factory.mktemp("cache")),
        "IPYTHONDIR": str(tmp_path_factory.mktemp("ipython")),
        "HF_HUB_OFFLINE": "1",
    }

    def run(*command):
        command = [python, *command]
        return subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, timeout=900
        )

    return run


def clean():
    """The environment without what leads to the checkout."""
    return {
        name: value
        for name, value in os.environ.items()
        if name != "PYTHONPATH" and not name.startswith("DIFFECHO_")
    }


def test_package_is_the_installed_one(colab, python):
    place = colab("-c", "import diffecho_utils; print(diffecho_utils.__file__)").stdout.strip()
    assert Path(place).is_relative_to(python.parents[1])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_chapter_runs_without_a_checkout(path, colab, trial, tmp_path):
    """Its copy for teachers, with each check of an answer first tried on the student's stub."""
    out, copy = tmp_path / path.name, tmp_path / f"trial-{path.name}"
    nbformat.write(trial(nbformat.read(path, as_version=4)), copy)
    options = ["-p", "profile_name", "smoke", "--kernel", "python3", "--no-progress-bar"]
    ran = colab("-m", "papermill", copy, out, *options)
    assert ran.returncode == 0, ran.stderr[-3000:]
    notebook = nbformat.read(out, as_version=4)
    images = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(images) > 3
    del notebook.metadata["papermill"]  # names the file that was read
    assert str(ROOT) not in nbformat.writes(notebook), "nothing of the checkout was used"
