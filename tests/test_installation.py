"""What an installation brings: the commit that was named, its files, and no change of packages that suit."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import course
import nbformat
import pytest
import yaml
from conftest import environment, outside

from diffecho_utils import __version__

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = "https://github.com/diffecho-book/diffecho-book"
MISSING = {"einops", "monai", "nibabel", "pooch", "torchmetrics"}  # on Colab, or nearly so
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = PROJECT["dependencies"]


def run(*command, **options):
    options = {"check": True, "capture_output": True, "text": True} | options
    return subprocess.run(list(map(str, command)), **options).stdout.strip()


def read_yaml(name):
    return yaml.safe_load((ROOT / name).read_text())


# Which code, and which data


def commit(folder):
    """Make a repository of a folder, of one commit: its 40 digits."""
    git = ["git", "-C", folder, "-c", "user.name=x", "-c", "user.email=x@example.org"]
    run("git", "init", "--quiet", folder)
    run(*git, "add", "--all")
    run(*git, "commit", "--quiet", "--message", "first")
    return run(*git, "rev-parse", "HEAD")


def said(at, cwd):
    """What the package in the folder `at` says of itself: (its line, where it would fetch from)."""
    code = (
        "from diffecho_utils import assets, results; print(results.code()); print(assets.address())"
    )
    variables = outside() | {"PYTHONPATH": str(at)}
    return run(sys.executable, "-c", code, cwd=cwd, env=variables).splitlines()


def package(folder):
    """Copy the package, as it lies in site-packages, into a folder."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "diffecho_utils", folder / "diffecho_utils", ignore=ignored)
    return folder


@pytest.fixture
def checkout(tmp_path):
    """A repository with what of this one makes the package: (folder, commit)."""
    root = package(tmp_path / "checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitattributes", "_toc.yml"):
        shutil.copy(ROOT / name, root)
    (root / ".gitignore").write_text("__pycache__/\n")
    return root, commit(root)


def test_a_checkout_says_its_commit_and_changes(checkout, tmp_path):
    root, name = checkout
    line, address = said(root, tmp_path)
    assert line == f"diffecho_utils {__version__}, commit {name[:7]}" and f"/{name}/data" in address
    run("git", "-C", root, "worktree", "add", "--quiet", tmp_path / "tree")
    assert said(tmp_path / "tree", tmp_path)[0] == line
    (root / "notes.txt").write_text("beside the package")
    assert said(root, tmp_path)[0] == line
    (root / "diffecho_utils" / "commit.txt").write_text("changed")
    assert said(root, tmp_path)[0] == line + "+"


@pytest.mark.parametrize("place", [".", "vendor", ".venv/lib/python3.11/site-packages"])
def test_another_repository_around_the_package_is_not_asked(tmp_path, place):
    (tmp_path / "README.md").write_text("somebody's own work")
    folder = package(tmp_path / place)
    commit(tmp_path)
    line, address = said(folder, tmp_path)
    assert line == f"diffecho_utils {__version__}, commit unknown ({__version__})"
    assert f"/v{__version__}/data" in address, "the tag of the version"


def test_package_that_pip_cloned_says_its_commit(tmp_path):
    folder = package(tmp_path / "site-packages")
    note = folder / f"diffecho_utils-{__version__}.dist-info" / "direct_url.json"
    note.parent.mkdir()
    note.write_text(json.dumps({"url": ADDRESS, "vcs_info": {"vcs": "git", "commit_id": "a" * 40}}))
    assert said(folder, tmp_path)[0].endswith(", commit aaaaaaa")


def test_setup_installs_the_commit_it_names_and_says_so(checkout, tmp_path, serve):
    """From an archive that git makes as GitHub does, by the cell's own first lines, without dependencies."""
    root, name = checkout
    archive = tmp_path / "site" / "archive" / f"{name}.zip"
    archive.parent.mkdir(parents=True)
    form = ["--format=zip", f"--prefix=diffecho-book-{name}/", f"--output={archive}"]
    run("git", "-C", root, "archive", *form, "HEAD")
    python, site = environment(tmp_path / "environment")
    notebook = nbformat.read(ROOT / "notebooks" / "01_camus_data.ipynb", as_version=4)
    assert course.pin(notebook, name)
    cell = next(cell.source for cell in notebook.cells if "%pip" in cell.source)
    assert "print(results.code())" in cell
    cell = cell[: cell.index("\n\nimport ")] + "\nfrom diffecho_utils import results"
    cell += "\nprint(results.code())"  # what else Setup imports needs the dependencies
    pip = {"PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1"}
    pip |= {"IPYTHONDIR": str(tmp_path / "ipython"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    with serve(tmp_path / "site") as address:
        ipython = [python, "-m", "IPython", "--colors=NoColor", "-c"]
        source = cell.replace(ADDRESS, address)
        assert source != cell
        told = run(*ipython, source, cwd=tmp_path, env=outside() | pip)
    assert f"diffecho_utils {__version__}, commit {name[:7]}" in told.splitlines()
    assert f"/{name}/data" in said(site, tmp_path)[1]


def test_a_release_tags_chapters_that_install_the_tag(checkout, tmp_path):
    """The workflow's own lines, in a clone."""
    root, name = checkout
    shutil.copytree(ROOT / "notebooks", root / "notebooks")
    commit(root)
    (steps,) = [job["steps"] for job in read_yaml(".github/workflows/release.yml")["jobs"].values()]
    (script,) = [step["run"] for step in steps if step.get("name") == "Tag"]
    noted = tmp_path / "environment"
    run("bash", "-e", "-c", script, cwd=root, env=os.environ | {"GITHUB_ENV": str(noted)})
    tag = f"v{__version__}"
    assert noted.read_text() == f"tag={tag}\n"
    run("git", "-C", root, "checkout", "--quiet", tag)
    chapters = sorted((root / "notebooks").glob("*.ipynb"))
    assert len(chapters) == len(list((ROOT / "notebooks").glob("*.ipynb")))
    assert all(f"{ADDRESS}/archive/{tag}.zip" in path.read_text() for path in chapters)
    assert "+" not in said(root, tmp_path)[0]


def test_the_version_is_the_same_everywhere():
    assert PROJECT["version"] == read_yaml("CITATION.cff")["version"] == __version__


# What else changes


def versions(lines):
    pairs = [line.split("#")[0].split(";")[0].strip().split("==") for line in lines]
    return {name.lower(): version for name, version in filter(lambda pair: len(pair) == 2, pairs)}


LOWEST = {line.split(">=")[0]: line.split(">=")[1] for line in DEPENDENCIES}
LOWEST |= versions((ROOT / "tests" / "lowest.txt").read_text().splitlines())
PINNED = versions((ROOT / "requirements.txt").read_text().splitlines())
NEWER = ".999"
PRESENT = {re.split("[<>=]", line)[0] for line in DEPENDENCIES} - MISSING


def described(name, version, requires=()):
    lines = [f"Requires-Dist: {line}" for line in requires]
    return "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines, ""])


def wheel(folder, name, version, requires=()):
    """An empty package with a name, a version and requirements."""
    stem = f"{name.replace('-', '_')}-{version}"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{stem}.dist-info/METADATA", described(name, version, requires))
        tag = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{stem}.dist-info/WHEEL", tag)
        archive.writestr(f"{stem}.dist-info/RECORD", "")
    return path


def needed(names):
    """What is installed here of these packages and all that they need: {name: (version, needs)}."""
    found, waiting = {}, list(names)
    while waiting:
        name = waiting.pop()
        lines = metadata.requires(name) or []
        needs = [line for line in lines if "extra ==" not in line and "sys_platform" not in line]
        found[name] = metadata.version(name), needs
        below = {re.match(r"[\w.-]+", line)[0].lower() for line in needs}
        waiting += below - set(found) - PRESENT
    return found


def installed(folder, present):
    """What pip would install of the package: {name: version}. Everything is offered in a newer version, too."""
    offered, (python, site) = folder / "offered", environment(folder / "environment", False)
    offered.mkdir()
    for name, version in present.items():
        note = site / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
        note.parent.mkdir()
        note.write_text(described(name, version))
        wheel(offered, name, version.split(".")[0] + NEWER)
    for name, (version, needs) in needed(MISSING).items():
        wheel(offered, name, version, needs)
    ours = wheel(folder, "diffecho-utils", __version__, DEPENDENCIES)
    pip = [sys.executable, "-m", "pip", "--python", python, "install"]
    pip += ["--dry-run", "--quiet", "--report=-", "--no-index", "--find-links", offered, ours]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    report = json.loads(run(*pip, cwd=folder, env=clean))
    names = [item["metadata"] for item in report["install"]]
    return {item["name"].lower(): item["version"] for item in names}


def colab(pins):
    """What is present on Colab, in these versions: its torch carries the name of a CUDA version."""
    present = {name: pins[name] for name in PRESENT} | {"torchvision": "0.23.0"}
    return present | {"torch": f"{present['torch']}+cu126"}


@pytest.mark.parametrize("pins", [LOWEST, PINNED], ids=["lowest", "pinned"])
def test_installing_changes_no_package_that_suits(tmp_path, pins):
    new = installed(tmp_path, colab(pins))
    assert set(new) >= MISSING | {"diffecho-utils"}
    assert not {name: new[name] for name in colab(pins) if name in new}


def test_a_package_that_is_too_old_is_the_only_one_to_change(tmp_path):
    """So the test above sees an upgrade."""
    new = installed(tmp_path, colab(PINNED) | {"pandas": "2.1.4"})
    assert {name for name, version in new.items() if version.endswith(NEWER)} == {"pandas"}
