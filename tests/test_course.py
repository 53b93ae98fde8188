"""Copies for a course: what a student gets, what a teacher gets, and checks that tell one from the other."""

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from diffecho_utils import DiffEchoError, course

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

SOLUTION = """\
import math
def area(r):
    "Of a disc."
    return math.pi * r**2
total = area(1) + area(2)"""
CHECK = """\
from diffecho_utils import course
with course.exercise(1, area=area, total=total):
    assert area(1) > 3, "the area of a disc is pi r^2"
    assert total > area(2), "add both areas"
"""


@pytest.fixture
def chapter():
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


def test_student_gets_a_stub_and_no_answer(chapter):
    copy = course.student(chapter)
    text = "\n".join(cell.source for cell in copy.cells)
    for told in ("import math", "def area(r):", "Of a disc.", "total = ...", "Exercise 2", CHECK):
        assert told in text
    for kept in ("math.pi", "It is 5 pi", "print(total)"):
        assert kept not in text
    with pytest.raises(AssertionError, match="Exercise 1: `total` still to be found"):
        run(copy)
    assert len(chapter.cells) == 7 and chapter.cells[2].source == SOLUTION, "only a copy"


def test_an_unwritten_function_is_said(chapter):
    copy = course.student(chapter)
    for cell in copy.cells:
        cell.source = cell.source.replace("total = ...", "total = 0")
    with pytest.raises(NotImplementedError, match="exercise 1: write `area` first"):
        run(copy)


def test_wrong_answer_gets_the_hint(chapter):
    chapter.cells[2].source = SOLUTION.replace("+", "-")
    with pytest.raises(AssertionError, match="add both areas"):
        run(course.teacher(chapter))


def test_teacher_copy_and_trial_run(chapter, capsys):
    assert run(course.teacher(chapter))["total"] > 15
    run(course.trial(chapter))
    assert "Exercise 1: passed." in capsys.readouterr().out


def test_trial_refuses_a_check_that_the_stub_passes(chapter):
    chapter.cells[4].source = "from diffecho_utils import course"
    with pytest.raises(RuntimeError, match="exercise 1 passes on the stub"):
        run(course.trial(chapter))


def test_solution_without_a_check_is_refused(chapter):
    del chapter.cells[4]
    with pytest.raises(DiffEchoError, match="exercise 1: a solution and no cell tagged `check`"):
        course.student(chapter)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_chapter_has_checked_exercises(path, tmp_path):
    student, teacher = course.write([path], tmp_path)
    copies = [nbformat.read(folder / path.name, as_version=4) for folder in (student, teacher)]
    for copy in copies:
        nbformat.validate(copy)
    checks = [cell for cell in copies[1].cells if "check" in cell.metadata.get("tags", [])]
    assert len(checks) >= 3
    hidden = [cell for cell in copies[0].cells if "solution" in cell.metadata.get("tags", [])]
    assert not hidden and len(copies[0].cells) < len(copies[1].cells) + 1
