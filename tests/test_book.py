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

PARAMETERS = 'data_root = ""\nprofile_name = "cpu"\nresults_dir: str = ""'
FIGURE = """\
import matplotlib.pyplot as plt
from IPython.display import Markdown, display
plt.plot([0, 1])
plt.show()
display(Markdown("**Figure 1.** A *line* with $x_t$ and a [link](https://example.org). Live."))"""


def write_notebook(path, *cells):
    """A notebook of code cells; a cell is its source, or (source, tag)."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    notebook.cells = [nbformat.v4.new_markdown_cell(f"# {path.stem}")]
    for cell in cells:
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
    package = root / "diffecho_utils"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "shared.py").write_text("VALUE = 1\n")
    (package / "alpha.py").write_text("from diffecho_utils.shared import VALUE\n")
    (package / "beta.py").write_text("VALUE = 2\n")
    (root / "book").mkdir()
    (root / "book" / "intro.md").write_text("# Start\n\n[first](../notebooks/01_first.ipynb)\n")
    (root / "_config.yml").write_text((ROOT / "_config.yml").read_text())
    for name in ("_ext", "_static", "images"):  # what the settings name
        shutil.copytree(ROOT / "book" / name, root / "book" / name)
    (root / "book" / "references.bib").write_text("")
    (root / "_toc.yml").write_text(
        "format: jb-book\nroot: book/intro\nparts:\n- caption: Chapters\n  numbered: true\n"
        "  chapters:\n  - file: notebooks/01_first\n  - file: notebooks/02_second\n"
    )
    write_notebook(
        root / "notebooks" / "01_first.ipynb",
        "from diffecho_utils import alpha\nprint('first', alpha.VALUE)",
        (PARAMETERS, "parameters"),
        "import sys\nprint(sys.executable)",
        FIGURE,
        ("print('solved')", "solution"),
    )
    write_notebook(
        root / "notebooks" / "02_second.ipynb",
        "import diffecho_utils.beta as beta\nprint('second', beta.VALUE)",
        (PARAMETERS, "parameters"),
        "from pathlib import Path\nPath('note.txt').write_text(data_root)\nprint(profile_name)",
    )
    return root


@pytest.fixture
def make(project, phantom_root, monkeypatch):
    """Builds the project, but for its pages (Sphinx takes long); returns what was executed."""
    monkeypatch.setattr(publish, "make_pages", lambda base: base / "html" / "index.html")
    executed = []
    execute = build._execute

    def counted(chapter, *rest):
        executed.append(chapter.name)
        execute(chapter, *rest)

    monkeypatch.setattr(build, "_execute", counted)

    def make(root=project, data=phantom_root, **options):
        executed.clear()
        build.build(data, "smoke", root=root, **options)
        return list(executed)

    return make


@pytest.fixture
def no_kernel(monkeypatch):
    """In place of papermill: each code cell prints its source and the parameters' results_dir is
    written to. For tests of what is executed, where a kernel would only cost its start."""

    def execute(source, out, parameters, *_):
        notebook = nbformat.read(source, as_version=4)
        notebook.metadata["language_info"] = {"name": "python"}
        for cell in notebook.cells[1:]:
            cell.outputs = [nbformat.v4.new_output("stream", text=cell.source)]
        (Path(parameters["results_dir"]) / f"{source.stem}.json").write_text("{}")
        nbformat.write(notebook, out)

    monkeypatch.setattr(build, "_papermill", execute)


def tree(project):
    return project / "_build" / "book" / "phantom-smoke"


def page(project, name):
    return nbformat.read(tree(project) / "source" / "notebooks" / f"{name}.ipynb", as_version=4)


def outputs(notebook):
    return "".join(
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )


def test_only_what_changed_is_executed_again(project, make, no_kernel, broken_root):
    make = functools.partial(make, data=broken_root)
    both = ["01_first", "02_second"]
    assert make() == both
    assert make() == []
    edit(project / "diffecho_utils" / "shared.py", "1", "7")
    assert make() == both, "the package changed"
    edit(project / "notebooks" / "02_second.ipynb", "# 02_second", "# New prose")
    assert make() == [], "prose needs no execution"
    assert page(project, "02_second").cells[0].source == "# New prose"
    edit(
        project / "notebooks" / "02_second.ipynb",
        "print(profile_name)",
        "print(profile_name + '!')",
    )
    assert make() == ["02_second"]
    os.utime(broken_root / "dataset.json")
    assert make() == []
    (broken_root / "database_nifti" / "patient0001" / "note.txt").write_text("Look again.")
    assert make() == both, "the data changed"
    (project / "data").mkdir()
    (project / "data" / "weights").write_text("new")
    assert make() == both, "a shipped file changed"
    assert make(force=True, chapters=["02_second"]) == ["02_second"]


def test_a_checkout_that_moved_executes_nothing(project, make, no_kernel, phantom_root, tmp_path):
    (project / "data").mkdir()
    (project / "data" / "weights").write_text("shipped")
    data = project / "_build" / "phantom-smoke"
    shutil.copytree(phantom_root, data)
    assert make(data=data) == ["01_first", "02_second"]
    moved = tmp_path / "elsewhere" / "copy"
    shutil.copytree(project, moved, copy_function=shutil.copyfile)  # with new times
    assert make(root=moved, data=moved / "_build" / "phantom-smoke") == []
    assert "solved" in outputs(page(moved, "01_first"))


def test_real_data_count_by_names_sizes_and_times(project, make, no_kernel, broken_root, tmp_path):
    (broken_root / "dataset.json").unlink()  # then nothing says that they are the phantom's
    assert make(data=broken_root) == ["01_first", "02_second"]
    moved = broken_root.rename(tmp_path / "another disk")
    assert make(data=moved) == []
    os.utime(next(moved.rglob("*.nii.gz")))
    assert make(data=moved) == ["01_first", "02_second"]


def test_recording_writes_to_the_checkout_and_does_not_trigger_itself(project, make, no_kernel):
    make()
    assert not (project / "data").exists()
    assert make(record=True) == ["01_first", "02_second"]
    records = project / "data" / "results" / "phantom" / "smoke"
    assert (records / "01_first.json").exists()
    assert make(record=True) == []
    (records / "runs.zip").write_text("made beside the book, and read by its chapters")
    assert make(record=True) == ["01_first", "02_second"]


def test_page_holds_outputs_captions_and_no_machine_path(project, make):
    make()
    first = page(project, "01_first")
    tags = [cell.metadata.get("tags", []) for cell in first.cells]
    assert [tag for tag in tags if "parameters" in tag] and ["injected-parameters"] not in tags
    text = (tree(project) / "source" / "notebooks" / "01_first.ipynb").read_text()
    assert str(tree(project)) not in text and "papermill" not in text
    figure, solution = first.cells[-2:]
    alt = figure.metadata["mystnb"]["image"]["alt"]
    assert alt == "Figure 1. A line with x_t and a link. Live."
    assert {"solution", "hide-cell"} <= set(solution.metadata["tags"])
    assert outputs(first).splitlines()[1] == sys.executable
    assert "smoke" in outputs(page(project, "02_second"))
    written = list(project.rglob("note.txt"))
    assert written == [tree(project) / "source" / "notebooks" / "note.txt"], "not in the checkout"
    timings = json.loads((tree(project) / "timings.json").read_text())
    assert list(timings) == ["01_first", "02_second"]
    assert set(timings["01_first"]) == {"seconds", "date", "hardware", "world", "profile"}


def test_unknown_parameter_stops_before_anything_runs(project, make):
    path = project / "notebooks" / "02_second.ipynb"
    edit(path, "results_dir: str = ", "elsewhere = ")
    with pytest.raises(
        DiffEchoError, match="no parameter results_dir.*data_root, elsewhere, profile_name"
    ):
        make()
    assert not tree(project).exists()


def test_failed_chapter_is_never_published(project, make):
    path = project / "notebooks" / "01_first.ipynb"
    shown = tree(project) / "source" / "notebooks" / "01_first.ipynb"
    shown.parent.mkdir(parents=True)
    shown.write_text("the last good page")
    edit(path, "print('solved')", "broken = 1 / 0")
    with pytest.raises(DiffEchoError) as caught:
        make()
    failed = tree(project) / "failed" / "01_first.ipynb"
    for part in ("01_first", "`broken = 1 / 0`", "ZeroDivisionError", str(failed)):
        assert part in str(caught.value)
    assert "first 1" in outputs(nbformat.read(failed, as_version=4)), "kept for reading"
    assert shown.read_text() == "the last good page"
    assert not list(tree(project).rglob("*.partial.ipynb"))


def test_a_line_a_minute_says_the_cell(project, make, monkeypatch, capsys):
    hurried = types.SimpleNamespace(monotonic=lambda: 60 * time.monotonic())
    monkeypatch.setattr(build, "time", hurried)
    edit(
        project / "notebooks" / "02_second.ipynb",
        "from pathlib",
        "__import__('time').sleep(5)\\nfrom pathlib",
    )
    make(chapters=["02_second"])
    cells = re.findall(r"02_second: \d+ min, cell (\d+)", capsys.readouterr().out)
    assert cells == sorted(cells) and cells[-1] == "5", "with the title and the build's parameters"


def test_lost_process_is_said(project, make):
    source = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    write_notebook(project / "notebooks" / "01_first.ipynb", (PARAMETERS, "parameters"), source)
    with pytest.raises(DiffEchoError, match="01_first: its process was lost"):
        make()


def test_chosen_chapters(project, make, no_kernel, capsys):
    with pytest.raises(DiffEchoError, match="04_none.*01_first, 02_second"):
        make(chapters=["04_none"])
    assert make(chapters=["02_second"]) == ["02_second"]
    assert "not executed" in page(project, "01_first").cells[1].source
    make()
    edit(project / "notebooks" / "01_first.ipynb", "print('solved')", "print('anew')")
    assert make(chapters=["02_second"]) == []
    assert "out of date" in capsys.readouterr().out
    assert "solved" in outputs(page(project, "01_first")), "keeps its last page"


@pytest.mark.parametrize("jobs", [1, 2])
def test_interruption_leaves_nothing_half_done(project, phantom_root, jobs):
    note = tree(project) / "process"
    source = f"import os, pathlib, time\npathlib.Path({str(note)!r}).write_text(str(os.getpid()))"
    source += "\ntime.sleep(60)"
    write_notebook(project / "notebooks" / "02_second.ipynb", (PARAMETERS, "parameters"), source)
    code = (
        f"import sys; sys.path.insert(0, 'book/tools'); import build; build.build({str(phantom_root)!r}, 'smoke', "
        f"root={str(project)!r}, jobs={jobs})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        # a run in the background ignores the signal, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    done = tree(project) / "executed" / "01_first.ipynb"
    deadline = time.monotonic() + 60
    while not (note.exists() and done.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) != 0
    assert [path.name for path in (tree(project) / "executed").iterdir()] == ["01_first.ipynb"]
    with pytest.raises(ProcessLookupError):  # no kernel is left behind
        os.kill(int(note.read_text()), 0)


def test_chapters_at_the_same_time(project, make, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    edit(project / "notebooks" / "01_first.ipynb", "import sys", "import os, sys")
    edit(
        project / "notebooks" / "01_first.ipynb", "sys.executable", "os.environ['OMP_NUM_THREADS']"
    )
    edit(project / "notebooks" / "01_first.ipynb", "print('solved')", "1 / 0")
    with pytest.raises(DiffEchoError, match="01_first.*ZeroDivisionError"):
        make(jobs=2)
    assert (tree(project) / "executed" / "02_second.ipynb").exists(), "the other one is kept"
    edit(project / "notebooks" / "01_first.ipynb", "1 / 0", "print('solved')")
    make(jobs=2)
    first, second = (outputs(page(project, name)) for name in ("01_first", "02_second"))
    assert "solved" in first and "smoke" in second
    assert first.splitlines()[1] == str(max(1, results.cores() // 2))


def test_pages_are_built_and_warnings_keep_the_old_ones(project, phantom_root, capsys):
    index = build.build(phantom_root, "smoke", root=project)
    assert f"open {index}" in capsys.readouterr().out
    html = (index.parent / "notebooks" / "01_first.html").read_text()
    assert 'alt="Figure 1. A line with x_t and a link. Live."' in html
    assert "Show the solution" in html
    loaded = r'<script[^>]* src="https?:|<link[^>]*rel="stylesheet"[^>]*href="https?:'
    assert not re.search(loaded, html), "the page needs no network"
    edit(project / "book" / "intro.md", "01_first", "05_nowhere")
    for _ in range(2):  # Sphinx alone would let the second build pass
        with pytest.raises(DiffEchoError, match="05_nowhere"):
            build.build(phantom_root, "smoke", root=project)
    assert "01_first" in (index.parent / "book" / "intro.html").read_text()


# The project's own files


def test_table_of_contents_lists_the_chapters_that_exist():
    assert [path.name for path in build._notebooks(ROOT)] == [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_chapter_is_ready_to_be_executed(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert build._declared(notebook, path) >= {"data_root", "profile_name", "results_dir"}
    for cell in notebook.cells:
        assert not cell.get("outputs"), "committed without outputs"
        assert cell.get("execution_count") is None


def test_page_on_profiles_agrees_with_them():
    rows = re.findall(
        r"\| `(\w+)`.*?\| (\d+) px \| (\d+) ", (ROOT / "book/how_to_run.md").read_text()
    )
    assert {name: (int(side), int(patients)) for name, side, patients in rows} == {
        name: (row.side, row.phantom_patients) for name, row in profiles.PROFILES.items()
    }


def test_repository_has_one_address():
    address = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    owner, name = address.removeprefix("https://github.com/").split("/")
    pages = yaml.safe_load((ROOT / "_config.yml").read_text())["html"]["baseurl"]
    assert pages == f"https://{owner}.github.io/{name}/"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["urls"] == {"Repository": address, "Book": pages}
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"] == address
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *NOTEBOOKS]
    files += [
        *(ROOT / "book").rglob("*.md"),
        *(ROOT / "diffecho_utils").glob("*.py"),
        *(ROOT / "book").rglob("*.py"),
    ]
    for path in files:
        text = path.read_text()
        owners = re.findall(rf"github\.com/([\w.-]+)/{name}\b", text)
        owners += re.findall(r"([\w-]+)\.github\.io", text)
        assert set(owners) <= {owner}, path


def imported(path):
    """Top-level names that a Python file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_package_declares_what_it_imports():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = sum(project["optional-dependencies"].values(), [])
    declared = {re.split("[<>=]", line)[0] for line in project["dependencies"] + optional}
    names = {"PIL": "pillow", "yaml": "pyyaml", "IPython": "ipython"}
    brought = {"pyyaml", "ipython", "nbformat"}  # by papermill and ipykernel
    for path in (ROOT / "diffecho_utils").glob("*.py"):
        for found in imported(path):
            name = names.get(found, found).replace("_", "-")
            known = found in sys.stdlib_module_names or found == "diffecho_utils"
            assert known or name in declared | brought, f"{path}: {found}"


def test_requirements_are_pinned_and_cover_the_package():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    lines = [line.split("#")[0].split(";")[0].strip() for line in lines]
    pins = [line for line in lines if line]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    pinned = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    del optional["pretrained"]  # the book's own pages do without torchvision
    wanted = project["dependencies"] + sum(optional.values(), [])
    assert {re.split("[<>=]", line)[0].lower() for line in wanted} <= pinned


def test_bounds_are_the_versions_that_were_tested():
    lines = (ROOT / "tests" / "lowest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = dict(line.split(">=") for line in project["dependencies"])
    del bounds["torch"]
    assert set(bounds) <= set(pins)
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
