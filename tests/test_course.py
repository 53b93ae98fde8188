"""Copies for a course: what a student gets, what a teacher gets, and checks that tell one from the other."""

from pathlib import Path

import course
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from diffecho_utils import DiffEchoError, results

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COMMIT = "0123456" + "a" * 33

SOLUTION = """\
import math
def area(r):
    "Of a disc."
    return math.pi * r**2
total = area(1) + area(2)"""
CHECK = """\
from diffecho_utils import chapter
with chapter.exercise(1, area=area, total=total):
    assert area(1) > 3, "the area of a disc is pi r^2"
    assert total > area(2), "add both areas"
"""


@pytest.fixture
def taught():
    cells = [
        new_markdown_cell("# A chapter"),
        new_markdown_cell("## Exercises\n\n### Exercise 1: Discs\n\nAdd two."),
        new_code_cell(SOLUTION, metadata={"tags": ["solution"]}),
        new_code_cell("print(total)", metadata={"tags": ["solution"]}),
        new_code_cell(CHECK, metadata={"tags": ["check"]}),
        new_markdown_cell("It is 5 pi.\n\n### Exercise 2: A project\n\nWithout a solution."),
        new_markdown_cell("## Summary"),
    ]
    return new_notebook(cells=cells)


def run(notebook):
    namespace = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(cell.source, namespace)
    return namespace


def test_student_gets_a_stub_and_no_answer(taught):
    copy = course.student(taught)
    text = "\n".join(cell.source for cell in copy.cells)
    for told in ("import math", "def area(r):", "Of a disc.", "total = ...", "Exercise 2", CHECK):
        assert told in text
    for kept in ("math.pi", "It is 5 pi", "print(total)"):
        assert kept not in text
    with pytest.raises(AssertionError, match="Exercise 1: `total` still to be found"):
        run(copy)
    copy.cells[2].source = copy.cells[2].source.replace("total = ...", "total = 0")
    with pytest.raises(NotImplementedError, match="exercise 1: write `area` first"):
        run(copy)
    assert len(taught.cells) == 7 and taught.cells[2].source == SOLUTION, "only a copy"


def test_teacher_copy_and_trial_run_and_tell_what_is_wrong(taught, trial, capsys):
    assert run(course.teacher(taught))["total"] > 15
    run(trial(taught))
    assert "Exercise 1: passed." in capsys.readouterr().out
    taught.cells[2].source = SOLUTION.replace("+", "-")
    with pytest.raises(AssertionError, match="add both areas"):
        run(course.teacher(taught))
    taught.cells[4].source = "from diffecho_utils import chapter"
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):  # on the stub
        run(trial(taught))
    taught.cells[4].source = CHECK.replace("exercise(1", "exercise(2")
    with pytest.raises(DiffEchoError, match=r"exercise 1: .* of \[2\]; is a heading missing"):
        course.student(taught)
    del taught.cells[4]
    with pytest.raises(DiffEchoError, match="exercise 1: a solution and no cell tagged `check`"):
        course.student(taught)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_chapter_has_checked_exercises_and_no_outputs(path, tmp_path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    folders = course.write([path], tmp_path, "v9.9.9")
    student, teacher = (nbformat.read(folder / path.name, as_version=4) for folder in folders)
    for copy in (student, teacher):
        nbformat.validate(copy)
        text = nbformat.writes(copy)
        assert "diffecho-book/archive/v9.9.9.zip" in text and "main.zip" not in text
    assert len(tagged(teacher, "check")) >= 3
    assert not tagged(student, "solution") and len(student.cells) <= len(teacher.cells)


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


@pytest.fixture
def at(taught, tmp_path, monkeypatch):
    """Writes copies of the chapter in a checkout whose package is of a commit and whose remote has branches."""
    install = "%pip install https://github.com/diffecho-book/diffecho-book/archive/main.zip"
    taught.cells.insert(0, new_code_cell(install))
    nbformat.write(taught, tmp_path / "01_a.ipynb")

    def at(commit, branches="origin/main"):
        monkeypatch.setattr(results, "revision", lambda: commit)
        monkeypatch.setattr(results, "git", lambda *_: branches)
        folders = course.write([tmp_path / "01_a.ipynb"], tmp_path)
        copies = [nbformat.read(folder / "01_a.ipynb", as_version=4) for folder in folders]
        return [copy.cells[0].source.rpartition("/")[2] for copy in copies]

    return at


def test_copies_install_the_commit_of_the_checkout(at, capsys):
    assert at(COMMIT) == [f"{COMMIT}.zip"] * 2
    assert not capsys.readouterr().out
    at(COMMIT, branches="")
    assert "0123456 is in no branch of a remote; push it" in capsys.readouterr().out


@pytest.mark.parametrize(
    "commit, told", [(None, "which commit"), (f"{COMMIT}+", "differs from commit 0123456,")]
)
def test_copies_of_an_unknown_or_changed_package_are_not_written(at, commit, told, tmp_path):
    with pytest.raises(DiffEchoError, match=f"{told}.*REVISION="):
        at(commit)
    assert not (tmp_path / "student").exists()


def test_a_chapter_without_the_installing_cell_is_named(taught, tmp_path):
    nbformat.write(taught, tmp_path / "01_a.ipynb")
    with pytest.raises(DiffEchoError, match="01_a.ipynb: no cell installs an archive"):
        course.write([tmp_path / "01_a.ipynb"], tmp_path, "v9.9.9")
