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
                    f"{path}: no cell installs an archive of the repository; take that cell of "
                    "another chapter"
                )
            files.write_text(folder / Path(path).name, nbformat.writes(notebook) + "\n")
    return folders


def _revision():
    found = results.revision()
    if found is None or found.endswith("+"):
        what = "nothing tells which commit this is"
        if found:
            what = f"differs from commit {found[:7]}, which the copies would install; commit and push it"
        raise DiffEchoError(
            f"{results.ROOT / 'diffecho_utils'}: {what}; or name what the copies shall install: "
            "`make course REVISION=v0.1.0`, a tag or a commit"
        )
    if results.git("branch", "--remotes", "--contains", found) == "":
        print(
            f"note: commit {found[:7]} is in no branch of a remote; push it before the copies are used"
        )
    return found


def pin(notebook, revision):
    """Let a chapter install the package of this tag or commit; False where no cell installs one."""
    code = (cell for cell in notebook.cells if cell.cell_type == "code")
    cell = next((cell for cell in code if "%pip install" in cell.source), None)
    if cell is None:
        return False
    cell.source, found = re.subn(r"/archive/\S+\.zip", f"/archive/{revision}.zip", cell.source)
    return found > 0


def student(notebook):
    """A copy with stubs for solutions and without their discussion."""
    notebook = copy.deepcopy(notebook)
    for number, solutions, check, discussion in _exercises(notebook):
        stub = _stub(number, solutions, check)
        solutions[0].update(nbformat.v4.new_code_cell(stub, id=solutions[0].id))
        for cell in discussion:  # a cell may go on to the next heading
            cell.source = "".join(re.findall(r"(?ms)^##.*", cell.source))
        for cell in solutions[1:] + [cell for cell in discussion if not cell.source]:
            notebook.cells.remove(cell)
    return notebook


def teacher(notebook):
    """A copy as the chapter is, with a line above each solution that says what it is."""
    notebook = copy.deepcopy(notebook)
    for number, solutions, _, _ in _exercises(notebook):
        solutions[0].source = f"# Solution of exercise {number}\n{solutions[0].source}"
    return notebook


def _exercises(notebook):
    """The exercises that have a solution, in order: (number, cells of the solution, check, discussion)."""
    found = [(None, [], [], [])]  # what lies outside of exercises comes to one without a number
    for cell in notebook.cells:
        number, solutions, checks, discussion = found[-1]
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "markdown":
            if solutions:
                discussion.append(cell)
            headings = re.findall(r"(?m)^(?:### Exercise (\d+)|## )", cell.source)
            found += [(int(name) if name else None, [], [], []) for name in headings]
        elif "solution" in tags:
            solutions.append(cell)
        elif "check" in tags:
            checks.append(cell)
    for number, solutions, checks, discussion in found:
        if number and solutions:
            if not checks:
                raise DiffEchoError(f"exercise {number}: a solution and no cell tagged `check`")
            told = re.findall(r"chapter\.exercise\((\d+)", "".join(cell.source for cell in checks))
            if others := [int(other) for other in told if int(other) != number]:
                raise DiffEchoError(
                    f"exercise {number}: below it stands the check of {others}; is a heading missing?"
                )
            yield number, solutions, checks[-1], discussion


def _stub(number, solutions, check):
    """What a student starts from: imports, functions without their bodies, answers without values."""
    lines, functions = [], set()
    for statement in ast.parse("\n".join(cell.source for cell in solutions)).body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            lines.append(ast.unparse(statement))
        elif isinstance(statement, ast.FunctionDef):
            functions.add(statement.name)
            message = f"exercise {number}: write `{statement.name}` first"
            told = statement.body[:1] if ast.get_docstring(statement) else []
            statement.body = told + ast.parse(f"raise NotImplementedError({message!r})").body
            lines += ["", ast.unparse(statement), ""]
    answers = [
        keyword.arg
        for node in ast.walk(ast.parse(check.source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "chapter.exercise"
        for keyword in node.keywords
    ]
    lines += [f"{name} = ..." for name in answers if name not in functions]
    text = "\n".join([f"# Exercise {number}: your answer; the next cell checks it", *lines])
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def main():
    """The command line of `make course`."""
    parser = ArgumentParser(description="Copies of the chapters for students and teachers.")
    parser.add_argument("--out", help="default: _build/course")
    parser.add_argument("--revision", help="tag or commit that they install; default: this commit")
    options = parser.parse_args()

    def run():
        notebooks = sorted((assets.root() / "notebooks").glob("*.ipynb"))
        out = options.out or assets.workspace() / "course"
        for folder in write(notebooks, out, options.revision):
            print(f"wrote {len(notebooks)} chapters to {folder}")

    return said(run)


if __name__ == "__main__":
    sys.exit(main())
