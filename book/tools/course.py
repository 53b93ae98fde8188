"""Copies of the chapters for a course: students', with stubs for the solutions, and teachers'.

Teaching guide. In a chapter each exercise is a heading `### Exercise N: ...`, one or more cells tagged
`solution`, a cell tagged `check`, and prose that discusses the answer. A student's copy keeps the heading, has a
stub in place of the solutions, keeps the check, and leaves the discussion out. A teacher's copy has everything.
"""

import ast
import copy
import re
import sys
from argparse import ArgumentParser
from pathlib import Path

import nbformat

from diffecho_utils import DiffEchoError, assets, files, results
from diffecho_utils.__main__ import said


def write(notebooks, out, revision=None):
    """Write `student/` and `teacher/` copies of the notebooks (paths) below `out`; returns both folders.

    revision: the tag or commit of the repository whose package the copies install where there is none;
    by default this checkout's commit. Raises DiffEchoError where that is unknown, or not all there is.
    """
    revision = revision or _revision()
    folders = [Path(out) / name for name in ("student", "teacher")]
    for folder, make in zip(folders, (student, teacher), strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        for path in notebooks:
            notebook = make(nbformat.read(path, as_version=4))
            if not pin(notebook, revision):
                raise DiffEchoError(
                    f"{path}: its first code cell installs no archive of the repository; take that cell of "
                    "another chapter"
                )
            files.write_text(folder / Path(path).name, nbformat.writes(notebook) + "\n")
    return folders


def _revision():
    found = results.revision()
    remedy = "name what the copies shall install: `make course REVISION=v0.1.0`, a tag or a commit"
    if found is None:
        raise DiffEchoError(f"{results.ROOT}: nothing tells which commit this is; {remedy}")
    if found.endswith("+"):
        raise DiffEchoError(
            f"{results.ROOT / 'diffecho_utils'}: differs from commit {found[:7]}, which the copies would "
            f"install; commit and push what changed, or {remedy}"
        )
    if results.git("branch", "--remotes", "--contains", found) == "":
        print(
            f"note: commit {found[:7]} is in no branch of a remote; push it before the copies are used"
        )
    return found


def pin(notebook, revision):
    """Let the first code cell install the package of this tag or commit; False where it installs none."""
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    cell.source, found = re.subn(r"/archive/\S+\.zip", f"/archive/{revision}.zip", cell.source)
    return found > 0


def student(notebook):
    """A copy with stubs for solutions and without their discussion."""
    notebook = copy.deepcopy(notebook)
    for part in _exercises(notebook):
        stub = nbformat.v4.new_code_cell(_stub(part), id=part.solutions[0].id)
        notebook.cells[notebook.cells.index(part.solutions[0])] = stub
        for cell in part.solutions[1:]:
            notebook.cells.remove(cell)
        for cell in part.discussion:
            cell.source = _from_heading(cell.source)
            if not cell.source:
                notebook.cells.remove(cell)
    return notebook


def teacher(notebook):
    """A copy as the chapter is, with a line above each solution that says what it is."""
    notebook = copy.deepcopy(notebook)
    for part in _exercises(notebook):
        cell = part.solutions[0]
        cell.source = f"# Solution of exercise {part.number}\n{cell.source}"
    return notebook


def trial(notebook):
    """The teacher's copy in which every check is first tried on the stub and has to fail there."""
    notebook = teacher(notebook)
    for part in _exercises(notebook):
        attempt = f"""
try:
{_indented(part.check.source)}
except (AssertionError, NotImplementedError) as error:
    assert len(str(error)) > 20, "a check says what is amiss"
else:
    raise RuntimeError("the check of exercise {part.number} passes on the stub")"""
        cells = [nbformat.v4.new_code_cell(text) for text in (_stub(part), attempt.strip())]
        where = notebook.cells.index(part.solutions[0])
        notebook.cells[where:where] = cells
    return notebook


class _Exercise:
    """The cells of one exercise."""

    def __init__(self, number):
        self.number, self.solutions, self.check, self.discussion = number, [], None, []


def _exercises(notebook):
    """The exercises that have a solution, in order; DiffEchoError for one without a check."""
    found, current = [], None
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "markdown":
            headings = re.findall(r"(?m)^(?:### Exercise (\d+)|## )", cell.source)
            if current and current.solutions:
                current.discussion.append(cell)
            if headings:
                current = _Exercise(int(headings[-1])) if headings[-1] else None
                if current:
                    found.append(current)
        elif current and "solution" in tags:
            current.solutions.append(cell)
        elif current and "check" in tags:
            current.check = cell
    found = [part for part in found if part.solutions]
    for part in found:
        if part.check is None:
            raise DiffEchoError(f"exercise {part.number}: a solution and no cell tagged `check`")
    return found


def _stub(part):
    """What a student starts from: imports, functions without their bodies, answers without values."""
    lines, functions = [], set()
    for statement in ast.parse("\n".join(cell.source for cell in part.solutions)).body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            lines.append(ast.unparse(statement))
        elif isinstance(statement, ast.FunctionDef):
            functions.add(statement.name)
            lines += ["", *_bare(statement, part.number), ""]
    answers = [
        keyword.arg
        for node in ast.walk(ast.parse(part.check.source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "chapter.exercise"
        for keyword in node.keywords
    ]
    lines += [f"{name} = ..." for name in answers if name not in functions]
    text = "\n".join([f"# Exercise {part.number}: your answer; the next cell checks it", *lines])
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _bare(function, number):
    """Lines of a function that only has its signature and docstring."""
    told = ast.get_docstring(function, clean=False)
    message = f"exercise {number}: write `{function.name}` first"
    bare = copy.deepcopy(function)
    bare.body = [ast.Expr(ast.Constant(told))] if told else []
    bare.body += ast.parse(f"raise NotImplementedError({message!r})").body
    return ast.unparse(ast.fix_missing_locations(bare)).splitlines()


def _from_heading(source):
    """The text from its first heading on; nothing where there is none."""
    found = re.search(r"(?m)^##", source)
    return source[found.start() :] if found else ""


def _indented(source):
    return "\n".join(f"    {line}" if line else "" for line in source.splitlines())


def main(arguments=None):
    """The command line of `make course`."""
    parser = ArgumentParser(description="Copies of the chapters for students and teachers.")
    parser.add_argument("--out", type=Path, help="default: _build/course")
    parser.add_argument("--revision", help="tag or commit that they install; default: this commit")
    options = parser.parse_args(arguments)

    def run():
        notebooks = sorted((assets.root() / "notebooks").glob("*.ipynb"))
        for folder in write(
            notebooks, options.out or assets.workspace() / "course", options.revision
        ):
            print(f"wrote {len(notebooks)} chapters to {folder}")

    return said(run)


if __name__ == "__main__":
    sys.exit(main())
