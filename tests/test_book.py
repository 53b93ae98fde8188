"""The book: what is executed again and what is not, what gets into a page, and what never does."""

import ast
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import types
from pathlib import Path

import build
import nbformat
import publish
import pytest
import yaml

from diffecho_utils import DiffEchoError, profiles, results

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BOTH = ["01_first", "02_second"]

PARAMETERS = 'data_root = ""\nprofile_name = "cpu"\nresults_dir: str = ""'
FIGURE = """\
import matplotlib.pyplot as plt
from IPython.display import Markdown, display
plt.plot([0, 1])
plt.show()
display(Markdown("**Figure 1.** A *line* with $x_t$ and a [link](https://example.org). Live."))"""


def write_notebook(path, *cells):
    """A notebook of a title, the parameters and code cells; a cell is its source, or (source, tag)."""
    python = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": python})
    notebook.cells = [
        nbformat.v4.new_markdown_cell(f"# {path.stem}\n\n| | |\n|---|---|\n| Time | long |")
    ]
    for cell in [(PARAMETERS, "parameters"), *cells]:
        source, *tags = (cell,) if isinstance(cell, str) else cell
        notebook.cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": tags}))
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.fixture
def project(tmp_path):
    """A book of two chapters beside a package of its own."""
    root = tmp_path / "project"
    for name in ("_ext", "_static", "images"):  # what the settings name
        shutil.copytree(ROOT / "book" / name, root / "book" / name)
    shutil.copy(ROOT / "_config.yml", root)
    shutil.copy(ROOT / "book" / "status.md", root / "book")
    (root / "diffecho_utils").mkdir()
    (root / "diffecho_utils" / "__init__.py").write_text("VALUE = 1\n")
    (root / "book" / "references.bib").write_text("")
    (root / "book" / "intro.md").write_text("# Start\n\n[first](../notebooks/01_first.ipynb)\n")
    pages = [{"file": f"notebooks/{name}"} for name in BOTH]
    pages.append({"file": "book/status"})
    toc = {"format": "jb-book", "root": "book/intro", "parts": [{"chapters": pages}]}
    (root / "_toc.yml").write_text(yaml.safe_dump(toc))
    write_notebook(
        root / "notebooks" / "01_first.ipynb",
        "import os, sys, diffecho_utils\nprint('first', diffecho_utils.VALUE)",
        "print(sys.executable, os.environ.get('OMP_NUM_THREADS'))",
        FIGURE,
        ("print('solved')", "solution"),
    )
    write_notebook(
        root / "notebooks" / "02_second.ipynb",
        "from pathlib import Path\nPath('note.txt').write_text(data_root)\nprint(profile_name)",
    )
    return root


@pytest.fixture
def make(project, phantom_root, monkeypatch):
    """Builds the project, but for its pages (Sphinx takes long); returns what was executed."""
    monkeypatch.setattr(publish, "make_pages", lambda base: base / "html" / "index.html")
    executed, execute = [], build._execute

    def counted(chapter, *rest):
        executed.append(chapter.name)
        return execute(chapter, *rest)

    monkeypatch.setattr(build, "_execute", counted)

    def make(root=project, data=phantom_root, **options):
        executed.clear()
        build.build(data, "smoke", root=root, **options)
        return list(executed)

    return make


@pytest.fixture
def quick(make, monkeypatch):
    """`make` without papermill: each code cell prints its source, and results_dir is written to.
    For tests of what is executed, where a kernel would only cost its start."""

    def execute(path, parameters, *_):
        notebook = nbformat.read(path, as_version=4)
        notebook.metadata["language_info"] = {"name": "python"}
        for cell in notebook.cells[1:]:
            cell.outputs = [nbformat.v4.new_output("stream", text=cell.source)]
        (Path(parameters["results_dir"]) / f"{path.stem}.json").write_text("{}")
        nbformat.write(notebook, path)

    monkeypatch.setattr(build, "_papermill", execute)
    return make


def tree(project):
    return project / "_build" / "book" / "phantom-smoke"


def page(project, name):
    return nbformat.read(tree(project) / "source" / "notebooks" / f"{name}.ipynb", as_version=4)


def outputs(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return "".join(output.get("text", "") for cell in cells for output in cell.outputs)


def test_only_what_changed_is_executed_again(project, quick, phantom_root, tmp_path):
    data = project / "_build" / "phantom"
    shutil.copytree(phantom_root, data)
    make, second = functools.partial(quick, data=data), project / "notebooks" / "02_second.ipynb"
    assert make() == BOTH and make() == []
    edit(project / "diffecho_utils" / "__init__.py", "1", "7")
    assert make() == BOTH, "the package changed"
    edit(second, "# 02_second", "# New prose")
    assert make() == [], "prose needs no execution"
    assert page(project, "02_second").cells[0].source.startswith("# New prose")
    edit(second, "print(profile_name)", "print(profile_name + '!')")
    assert make() == ["02_second"]
    (data / "database_nifti" / "patient0001" / "note.txt").write_text("Look again.")
    assert make() == BOTH, "the data changed"
    (project / "data").mkdir()
    (project / "data" / "weights").write_text("new")
    assert make() == BOTH, "a shipped file changed"
    assert make(force=True, chapters=["02_second"]) == ["02_second"]
    moved = tmp_path / "elsewhere" / "copy"
    shutil.copytree(project, moved, copy_function=shutil.copyfile)  # with new times
    assert quick(root=moved, data=moved / "_build" / "phantom") == []
    assert "solved" in outputs(page(moved, "01_first"))
    (data / "dataset.json").unlink()  # then nothing says that they are the phantom's:
    assert make() == BOTH
    data = data.rename(tmp_path / "another disk")
    assert quick(data=data) == [], "real data count by names, sizes and times"
    os.utime(next(data.rglob("*.nii.gz")))
    assert quick(data=data) == BOTH


def test_recording_writes_to_the_checkout_and_does_not_trigger_itself(project, quick):
    quick()
    assert not (project / "data").exists()
    assert quick(record=True) == BOTH
    records = project / "data" / "results" / "phantom" / "smoke"
    assert (records / "01_first.json").exists()
    assert quick(record=True) == []
    (records / "runs.zip").write_text("made beside the book, and read by its chapters")
    assert quick(record=True) == BOTH


def test_chosen_chapters(project, quick, capsys):
    with pytest.raises(DiffEchoError, match="04_none.*01_first, 02_second"):
        quick(chapters=["04_none"])
    assert quick(chapters=["02_second"]) == ["02_second"]
    assert "not executed" in page(project, "01_first").cells[1].source
    quick()
    edit(project / "notebooks" / "01_first.ipynb", "print('solved')", "print('anew')")
    assert quick(chapters=["02_second"]) == []
    assert "out of date" in capsys.readouterr().out
    assert "solved" in outputs(page(project, "01_first")), "keeps its last page"


@pytest.mark.parametrize(
    "tag, found", [("parameters", "data_root, elsewhere, profile_name"), ("other", "none")]
)
def test_unknown_parameter_stops_before_anything_runs(project, make, tag, found):
    path = project / "notebooks" / "02_second.ipynb"
    edit(path, "results_dir: str = ", "elsewhere = ")
    edit(path, '"parameters"', f'"{tag}"')
    with pytest.raises(DiffEchoError, match=f"no parameter .*results_dir .*which has {found};"):
        make()
    assert not tree(project).exists()


def test_pages_hold_outputs_and_warnings_keep_the_old_ones(project, phantom_root, capsys):
    index = build.build(phantom_root, "smoke", root=project)
    assert f"open {index}" in capsys.readouterr().out
    first = page(project, "01_first")
    tags = [cell.metadata.get("tags", []) for cell in first.cells]
    assert ["parameters"] in tags and ["injected-parameters"] not in tags
    text = (tree(project) / "source" / "notebooks" / "01_first.ipynb").read_text()
    assert str(tree(project)) not in text and "papermill" not in text
    figure, solution = first.cells[-2:]
    alt = figure.metadata["mystnb"]["image"]["alt"]
    assert alt == "Figure 1. A line with x_t and a link. Live."
    assert {"solution", "hide-cell"} <= set(solution.metadata["tags"])
    assert outputs(first).splitlines()[1].startswith(sys.executable)
    assert re.search(r"\| Time \| \d+ s on a .* profile smoke .*\) \|$", first.cells[0].source)
    assert "smoke" in outputs(page(project, "02_second"))
    written = list(project.rglob("note.txt"))
    assert written == [tree(project) / "source" / "notebooks" / "note.txt"], "not in the checkout"
    timings = json.loads((tree(project) / "timings.json").read_text())
    assert list(timings) == BOTH
    assert set(timings["01_first"]) >= {"seconds", "date", "hardware", "world", "profile"}

    html = (index.parent / "notebooks" / "01_first.html").read_text()
    assert f'alt="{alt}"' in html and "Show the solution" in html
    loaded = r'<script[^>]* src="https?:|<link[^>]*rel="stylesheet"[^>]*href="https?:'
    assert not re.search(loaded, html), "the page needs no network"
    edit(project / "book" / "intro.md", "01_first", "05_nowhere")
    for _ in range(2):  # Sphinx alone would let the second build pass
        with pytest.raises(DiffEchoError, match="05_nowhere"):
            build.build(phantom_root, "smoke", root=project)
    assert "01_first" in (index.parent / "book" / "intro.html").read_text()


def test_a_failed_chapter_is_never_published_and_others_are_kept(project, make, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    path = project / "notebooks" / "01_first.ipynb"
    shown = tree(project) / "source" / "notebooks" / "01_first.ipynb"
    shown.parent.mkdir(parents=True)
    shown.write_text("the last good page")
    edit(path, "print('solved')", "broken = 1 / 0")
    with pytest.raises(DiffEchoError) as caught:
        make(jobs=2)
    failed = tree(project) / "failed" / "01_first.ipynb"
    for part in ("01_first", "`broken = 1 / 0`", "ZeroDivisionError", str(failed)):
        assert part in str(caught.value)
    assert "first 1" in outputs(nbformat.read(failed, as_version=4)), "kept for reading"
    assert shown.read_text() == "the last good page"
    executed = tree(project) / "executed"
    assert [path.name for path in executed.iterdir()] == ["02_second.ipynb"]
    edit(path, "broken = 1 / 0", "print('solved')")
    assert make(jobs=2) == ["01_first"] and not failed.exists()
    threads = str(max(1, results.cores() // 2))
    assert outputs(page(project, "01_first")).splitlines()[1].split()[1] == threads


def test_a_line_a_minute_says_the_cell_and_a_lost_process_is_said(
    project, make, monkeypatch, capsys
):
    hurried = types.SimpleNamespace(monotonic=lambda: 60 * time.monotonic())
    monkeypatch.setattr(build, "time", hurried)
    lost = "import os, signal, time\ntime.sleep(3)\nos.kill(os.getpid(), signal.SIGKILL)"
    write_notebook(project / "notebooks" / "01_first.ipynb", "print('alive')", lost)
    with pytest.raises(DiffEchoError, match="01_first: its process was lost .*died"):
        make()
    cells = re.findall(r"01_first: \d+ min, cell (\d+)", capsys.readouterr().out)
    assert cells == sorted(cells) and cells[-1] == "5", "with the title and the build's parameters"


def test_interruption_leaves_nothing_half_done(project, phantom_root):
    note = tree(project) / "process"
    source = f"import os, pathlib, time\npathlib.Path({str(note)!r}).write_text(str(os.getpid()))"
    write_notebook(project / "notebooks" / "02_second.ipynb", source + "\ntime.sleep(60)")
    code = (
        f"import build; build.build({str(phantom_root)!r}, 'smoke', root={str(project)!r}, jobs=2)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT / "book" / "tools",
        stderr=subprocess.DEVNULL,
        # a run in the background ignores the signal, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    done = tree(project) / "executed" / "01_first.ipynb"
    deadline = time.monotonic() + 120
    while not (note.exists() and done.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) != 0
    assert list(done.parent.iterdir()) == [done]
    with pytest.raises(ProcessLookupError):  # no kernel is left behind
        os.kill(int(note.read_text()), 0)


# The project's own files

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]


def test_page_on_profiles_agrees_with_them():
    page = (ROOT / "book/how_to_run.md").read_text()
    rows = re.findall(r"\| `(\w+)`.*?\| (\d+) px \| (\d+) ", page)
    assert {name: (int(side), int(patients)) for name, side, patients in rows} == {
        name: (row.side, row.phantom_patients) for name, row in profiles.PROFILES.items()
    }


def test_repository_has_one_address():
    settings = yaml.safe_load((ROOT / "_config.yml").read_text())
    address, pages = settings["repository"]["url"], settings["html"]["baseurl"]
    owner, name = address.removeprefix("https://github.com/").split("/")
    assert pages == f"https://{owner}.github.io/{name}/"
    assert PROJECT["urls"] == {"Repository": address, "Book": pages}
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"] == address
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *NOTEBOOKS]
    paths += [*(ROOT / "book").rglob("*.md"), *(ROOT / "book").rglob("*.py")]
    for path in [*paths, *(ROOT / "diffecho_utils").glob("*.py")]:
        owners = re.findall(
            rf"github\.com/([\w.-]+)/{name}\b|([\w-]+)\.github\.io", path.read_text()
        )
        assert {found for pair in owners for found in pair if found} <= {owner}, path


def test_package_declares_what_it_imports():
    lines = PROJECT["dependencies"] + sum(OPTIONAL.values(), [])
    known = {re.split("[<>=]", line)[0].replace("-", "_") for line in lines}
    known |= {"diffecho_utils", "ipython"} | sys.stdlib_module_names  # the latter is ipykernel's
    called = {"PIL": "pillow", "yaml": "pyyaml", "IPython": "ipython", "sklearn": "scikit_learn"}
    for path in (ROOT / "diffecho_utils").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            names = [name.split(".")[0] for name in names]
            assert {called.get(name, name) for name in names} <= known, path


def test_requirements_are_pinned_and_cover_the_package():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [pin for line in lines if (pin := line.split("#")[0].split(";")[0].strip())]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    pinned = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    never = ("pretrained", "low-memory")  # torchvision, and what only a GPU needs
    optional = [needs for name, needs in OPTIONAL.items() if name not in never]
    wanted = PROJECT["dependencies"] + sum(optional, [])
    assert {re.split("[<>=]", line)[0].lower() for line in wanted} <= pinned


def test_bounds_are_the_versions_that_were_tested():
    lines = (ROOT / "tests" / "lowest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    bounds = dict(line.split(">=") for line in PROJECT["dependencies"])
    del bounds["torch"]
    for name, bound in bounds.items():
        assert pins[name].split(".")[: bound.count(".") + 1] == bound.split("."), name


def test_containers_install_what_the_makefile_installs():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    command = f"{container['postCreateCommand']} --always-make --dry-run"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--requirement requirements.txt" in done.stdout
    included = re.findall(r"^-r (\S+)$", (ROOT / ".binder/requirements.txt").read_text(), re.M)
    assert [(ROOT / ".binder" / name).resolve() for name in included] == [ROOT / "requirements.txt"]
