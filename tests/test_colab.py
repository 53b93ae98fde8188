"""The chapters as on Colab: the installed wheel, an empty folder, no repository, assets over the network."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import environment, outside

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A fresh environment with the wheel; other packages are there already, as on Colab."""
    folder = tmp_path_factory.mktemp("colab")
    build = "import sys; from flit_core import buildapi; print(buildapi.build_wheel(sys.argv[1]))"
    made = subprocess.check_output([sys.executable, "-c", build, folder], cwd=ROOT, text=True)
    python, _ = environment(folder / "environment")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    options = ["install", "--quiet", "--no-index", "--no-deps", folder / made.strip()]
    subprocess.run([*pip, *options], check=True, env=outside())
    return python


@pytest.fixture(scope="module")
def colab(tmp_path_factory, python, serve):
    """Runs a command of the environment in an empty folder that all chapters share.

    The checkout's data/ is served in place of the repository's.
    """
    place, cache, ipython = (tmp_path_factory.mktemp(n) for n in ("content", "cache", "ipython"))
    with serve(ROOT / "data") as address:
        variables = {"DIFFECHO_DATA_URL": address, "DIFFECHO_CACHE": str(cache)}
        variables |= outside() | {"IPYTHONDIR": str(ipython), "HF_HUB_OFFLINE": "1"}
        how = {"cwd": place, "env": variables, "capture_output": True, "text": True}
        yield lambda *command: subprocess.run([python, *command], **how, timeout=900)


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
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) > 3
    del notebook.metadata["papermill"]  # names the file that was read
    assert str(ROOT) not in nbformat.writes(notebook), "nothing of the checkout was used"
