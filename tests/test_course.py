"""Copies for a course: what a student gets, what a teacher gets, and checks that tell one from the other."""

import re
from pathlib import Path

import course
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from diffecho_utils import DiffEchoError, results

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

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
    assert len(taught.cells) == 7 and taught.cells[2].source == SOLUTION, "only a copy"


def test_an_unwritten_function_is_said(taught):
    copy = course.student(taught)
    for cell in copy.cells:
        cell.source = cell.source.replace("total = ...", "total = 0")
    with pytest.raises(NotImplementedError, match="exercise 1: write `area` first"):
        run(copy)


def test_wrong_answer_gets_the_hint(taught):
    taught.cells[2].source = SOLUTION.replace("+", "-")
    with pytest.raises(AssertionError, match="add both areas"):
        run(course.teacher(taught))


def test_teacher_copy_and_trial_run(taught, capsys):
    assert run(course.teacher(taught))["total"] > 15
    run(course.trial(taught))
    assert "Exercise 1: passed." in capsys.readouterr().out


def test_trial_refuses_a_check_that_the_stub_passes(taught):
    taught.cells[4].source = "from diffecho_utils import chapter"
    with pytest.raises(RuntimeError, match="exercise 1 passes on the stub"):
        run(course.trial(taught))


def test_solution_without_a_check_is_refused(taught):
    del taught.cells[4]
    with pytest.raises(DiffEchoError, match="exercise 1: a solution and no cell tagged `check`"):
        course.student(taught)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_chapter_has_checked_exercises(path, tmp_path):
    student, teacher = course.write([path], tmp_path, "v9.9.9")
    copies = [nbformat.read(folder / path.name, as_version=4) for folder in (student, teacher)]
    for copy in copies:
        nbformat.validate(copy)
        text = nbformat.writes(copy)
        assert "diffecho-book/archive/v9.9.9.zip" in text and "main.zip" not in text
    checks = [cell for cell in copies[1].cells if "check" in cell.metadata.get("tags", [])]
    assert len(checks) >= 3
    hidden = [cell for cell in copies[0].cells if "solution" in cell.metadata.get("tags", [])]
    assert not hidden and len(copies[0].cells) < len(copies[1].cells) + 1


def installs(copy):
    return re.findall(r"archive/(\S+)\.zip", copy.cells[0].source)


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
        return [installs(nbformat.read(f / "01_a.ipynb", as_version=4)) for f in folders]

    return at


def test_copies_install_the_commit_of_the_checkout(at, capsys):
    assert at("0123456" + "a" * 33) == [["0123456" + "a" * 33]] * 2
    assert not capsys.readouterr().out
    at("0123456" + "a" * 33, branches="")
    assert "0123456 is in no branch of a remote; push it" in capsys.readouterr().out


@pytest.mark.parametrize("commit", [None, "0123456" + "a" * 33 + "+"])
def test_copies_of_an_unknown_or_changed_package_are_not_written(at, commit, tmp_path):
    with pytest.raises(
        DiffEchoError, match="(?s)tells which commit|differs from commit 0123456,.*REVISION="
    ):
        at(commit)
    assert not (tmp_path / "student").exists()


def test_a_chapter_without_the_installing_cell_is_named(taught, tmp_path):
    nbformat.write(taught, tmp_path / "01_a.ipynb")
    with pytest.raises(DiffEchoError, match="01_a.ipynb: its first code cell installs no archive"):
        course.write([tmp_path / "01_a.ipynb"], tmp_path, "v9.9.9")
