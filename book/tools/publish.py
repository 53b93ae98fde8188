"""The pages: today's prose around the outputs of each chapter's execution, then Jupyter Book."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import nbformat

from diffecho_utils import DiffEchoError, claims, files, results

FOLDED = {"solution": "solution", "check": "check of your answer"}  # tag of a cell: in words


@dataclass(frozen=True)
class Chapter:
    name: str
    source: Path
    executed: Path  # its last execution, if any
    key: str  # of everything that an execution depends on

    def execution(self):
        """What was noted in `executed`: key, seconds, date, hardware, world, profile; None if never run."""
        if self.executed.exists():
            return dict(nbformat.read(self.executed, as_version=4).metadata["diffecho"])


def copy_pages(root, base):
    """Bring source/ up to date with the checkout."""
    pages = [path for path in (root / "book").rglob("*") if path.is_file()]
    pages += (root / "data").rglob("*.md")  # cards of the data and the networks
    for path in [root / "_config.yml", root / "_toc.yml", *pages]:
        _update(base / "source" / path.relative_to(root), path.read_bytes())


def _update(path, content):
    """Write bytes; a file that has them keeps its time stamp, by which Sphinx knows what to read anew."""
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.draft(path) as beside:
            beside.write_bytes(content)


def write_status(timings, names, path):
    """The table of the page on the build's status: who was executed when, where, for how long, on what."""
    lines = ["| chapter | took | world, profile | when | on |", "|---|---|---|---|---|"]
    for name in names:
        told = ["not executed", "", "", ""]
        if t := timings.get(name):
            where = f"{t['world']}, {t['profile']}"
            told = [_duration(t["seconds"]), where, t["date"], t["hardware"]]
        lines.append(f"| [](../notebooks/{name}.ipynb) | {' | '.join(told)} |")
    total = _duration(sum(t["seconds"] for t in timings.values()))
    versions = results.provenance("")["versions"].items()
    lines += ["", f"All chapters one after the other: {total}. Versions: "]
    lines += [", ".join(f"{name} {number}" for name, number in versions) + ".", ""]
    _update(path, "\n".join(lines).encode())


def write_claims(record, path):
    """The verdicts that chapter 11 has recorded, for the start page."""
    values = record["values"]
    told = f"The protocol is of {values['protocol']}; † measured with generators made before."
    _update(
        path, f"{claims.table(values['claims'])}\n\n{told} {results.describe(record)}.\n".encode()
    )


def _duration(seconds):
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def publish(chapter, folder):
    """Write a chapter as its page shows it: today's prose around the outputs of its execution.

    So neither the injected parameters nor papermill's notes, which name folders of this machine,
    get into the book. A chapter whose code changed since its execution keeps the page it had.
    """
    notebook = nbformat.read(chapter.source, as_version=4)
    before = chapter.execution()
    if before is None:
        note = "> This chapter was not executed in this build: its figures and numbers are missing."
        notebook.cells.insert(1, nbformat.v4.new_markdown_cell(note, id="not-executed"))
    elif before["key"] == chapter.key:
        _fill(notebook, nbformat.read(chapter.executed, as_version=4))
        _tell_time(notebook, before)
    else:
        return
    _update(folder / chapter.source.name, (nbformat.writes(notebook) + "\n").encode())


def _fill(notebook, executed):
    """Put the outputs of `executed` into `notebook`, which has the same code.

    Figures get their caption as alternative text; solutions and their checks are folded away.
    """
    notebook.metadata["language_info"] = executed.metadata["language_info"]
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    runs = [cell for cell in executed.cells if cell.cell_type == "code"]
    runs = [run for run in runs if "injected-parameters" not in run.metadata.get("tags", [])]
    for cell, run in zip(cells, runs, strict=True):
        cell.outputs, cell.execution_count = run.outputs, run.execution_count
        options = cell.metadata.setdefault("mystnb", {})
        if caption := _caption(run.outputs):
            options["image"] = {"alt": caption}
        tags = cell.metadata.get("tags", [])
        for what in [FOLDED[tag] for tag in tags if tag in FOLDED]:
            tags.append("hide-cell")
            options["code_prompt_show"] = f"Show the {what}"
            options["code_prompt_hide"] = f"Hide the {what}"


def _caption(outputs):
    """The "**Figure" caption after an image, as at most 250 characters of plain text, or None."""
    image = False
    for output in outputs:
        data = output.get("data", {})
        if any(kind.startswith("image/") for kind in data):
            image = True
        elif image and data.get("text/markdown", "").lstrip().startswith("**Figure"):
            text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", data["text/markdown"])
            whole = {"placeholder": "…", "break_on_hyphens": False}
            return textwrap.shorten(re.sub(r"[*`$]", "", text), 250, **whole)


def _tell_time(notebook, execution):
    """Put what the execution took into the row "Time" of the chapter's opening table."""
    took = (
        f"| Time | {_duration(execution['seconds'])} on a {execution['hardware']}, profile "
        f"{execution['profile']} ([this build](../book/status.md))"
    )
    for cell in notebook.cells:
        if cell.cell_type == "markdown":  # the guess ends where it says what dominates
            guess = r"(?m)^\| Time \| [^;|]*?(?= ?[;|])"
            cell.source = re.sub(guess, lambda _: took, cell.source)


def make_pages(base):
    """Run Jupyter Book on source/; replace html/ only by pages built without a warning."""
    made = base / "_build" / "html"
    (made / "index.html").unlink(missing_ok=True)  # it can exit 0 without having written it
    log = base / "pages.log"
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build"]
    command += [base / "source", "--path-output", base, "-n", "-W", "--keep-going"]
    print("pages: building", flush=True)
    with log.open("w") as stream:
        environment = os.environ | {"NO_COLOR": "1"}
        done = subprocess.run(command, stdout=stream, stderr=stream, env=environment)
    if done.returncode or not (made / "index.html").is_file():
        # Sphinx repeats no warning of a page it has read: the next build must read all again.
        shutil.rmtree(base / "_build" / ".doctrees", ignore_errors=True)
        lines = log.read_text().splitlines()
        shown = [line for line in lines if re.search("WARNING|ERROR|Error", line)][:20]
        lines = [f"{log}: the pages were not built", *(shown or lines[-20:])]
        raise DiffEchoError("\n".join(lines))
    with files.draft(base / "html") as fresh:
        shutil.copytree(made, fresh)
        shutil.rmtree(base / "html", ignore_errors=True)
    return base / "html" / "index.html"
