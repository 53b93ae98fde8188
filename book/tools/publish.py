"""The pages: today's prose around the outputs of each chapter's execution, then Jupyter Book."""

import os
import re
import shutil
import subprocess
import sys

import nbformat
import yaml

from diffecho_utils import DiffEchoError, files, results


def execution(path):
    """What `_execute` noted: key, seconds, date, hardware, world, profile; None if never run."""
    if not path.exists():
        return None
    return dict(nbformat.read(path, as_version=4).metadata["diffecho"])


def toc(root):
    """Names of all pages, without suffix, in the order of _toc.yml."""
    path = root / "_toc.yml"
    if not path.is_file():
        raise DiffEchoError(f"{path}: missing; the book is built from a checkout of its repository")

    def files(node):
        if isinstance(node, list):
            return [file for item in node for file in files(item)]
        if isinstance(node, dict):
            here = [node[key] for key in ("root", "file") if key in node]
            below = ("parts", "chapters", "sections")
            return here + [file for key in below for file in files(node.get(key))]
        return []

    pages = files(yaml.safe_load(path.read_text()))
    for page in pages:
        if not any((root / f"{page}{suffix}").is_file() for suffix in (".md", ".ipynb")):
            raise DiffEchoError(f"{path}: lists {page}, but there is no {page}.md or {page}.ipynb")
    return pages


def copy_pages(root, base):
    """Bring source/ up to date with the checkout; what did not change keeps its time stamp."""
    source = base / "source"
    (source / "notebooks").mkdir(parents=True, exist_ok=True)
    pages = [path for path in (root / "book").rglob("*") if path.is_file()]
    pages += (root / "data").rglob("*.md")  # cards of the data and the networks
    for path in [root / "_config.yml", root / "_toc.yml", *pages]:
        target = source / path.relative_to(root)
        if not target.exists() or target.read_bytes() != path.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def write_status(timings, notebooks, folder):
    """The table of the page on the build's status: who was executed when, where, for how long, on what."""
    lines = ["| chapter | took | world, profile | when | on |", "|---|---|---|---|---|"]
    for path in notebooks:
        t = timings.get(path.stem)
        cells = ["not executed", "", "", ""]
        if t:
            cells = [
                duration(t["seconds"]),
                f"{t['world']}, {t['profile']}",
                t["date"],
                t["hardware"],
            ]
        lines.append(f"| [](../notebooks/{path.name}) | {' | '.join(cells)} |")
    total = duration(sum(t["seconds"] for t in timings.values()))
    versions = results.provenance("")["versions"]
    lines += ["", f"All chapters one after the other: {total}. Versions: "]
    lines += [", ".join(f"{name} {number}" for name, number in versions.items()) + "."]
    folder.mkdir(parents=True, exist_ok=True)
    path, text = folder / "status.md", "\n".join(lines) + "\n"
    if not path.exists() or path.read_text() != text:
        files.write_text(path, text)


def duration(seconds):
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def publish(chapter, folder):
    """Write a chapter as its page shows it: today's prose around the outputs of its execution.

    So neither the injected parameters nor papermill's notes, which name folders of this machine,
    get into the book. A chapter whose code changed since its execution keeps the page it had.
    """
    notebook = nbformat.read(chapter.source, as_version=4)
    path = folder / chapter.source.name
    before = execution(chapter.executed)
    if before is None:
        note = "> This chapter was not executed in this build: its figures and numbers are missing."
        notebook.cells.insert(1, nbformat.v4.new_markdown_cell(note, id="not-executed"))
    elif before["key"] == chapter.key:
        _fill(notebook, nbformat.read(chapter.executed, as_version=4))
        _tell_time(notebook, before)
    else:
        return
    text = nbformat.writes(notebook) + "\n"
    if not path.exists() or path.read_text() != text:
        files.write_text(path, text)


def _fill(notebook, executed):
    """Put the outputs of `executed` into `notebook`, which has the same code.

    Figures get their caption as alternative text; solutions and their checks are folded away.
    """
    notebook.metadata["language_info"] = executed.metadata["language_info"]
    injected = "injected-parameters"
    sources, runs = (
        [cell for cell in cells if cell.cell_type == "code"]
        for cells in (notebook.cells, executed.cells)
    )
    runs = [cell for cell in runs if injected not in cell.metadata.get("tags", [])]
    for cell, run in zip(sources, runs, strict=True):
        cell.outputs, cell.execution_count = run.outputs, run.execution_count
        options = cell.metadata.setdefault("mystnb", {})
        caption = _caption(run.outputs)
        if caption:
            options["image"] = {"alt": caption}
        for tag, what in (("solution", "solution"), ("check", "check of your answer")):
            if tag in cell.metadata.get("tags", []):
                cell.metadata["tags"].append("hide-cell")
                options["code_prompt_show"] = f"Show the {what}"
                options["code_prompt_hide"] = f"Hide the {what}"


def _tell_time(notebook, execution):
    """Put what the execution took into the row "Time" of the chapter's opening table."""
    took = (
        f"{duration(execution['seconds'])} on a {execution['hardware']}, profile "
        f"{execution['profile']} ([this build](../book/status.md))"
    )
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            guess = r"(?m)^(\| Time \| )[^;|]*"  # up to what dominates
            cell.source, found = re.subn(guess, lambda row: row[1] + took, cell.source, count=1)
            if found:
                cell.source = cell.source.replace(took + "|", took + " |")
                return


def _caption(outputs):
    """The "**Figure" caption after an image, as at most 250 characters of plain text, or None."""
    image = False
    for output in outputs:
        data = output.get("data", {})
        if any(kind.startswith("image/") for kind in data):
            image = True
        elif image and data.get("text/markdown", "").lstrip().startswith("**Figure"):
            text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", data["text/markdown"])
            text = " ".join(re.sub(r"[*`$]", "", text).split())
            return text if len(text) <= 250 else text[:249].rsplit(" ", 1)[0] + "…"
    return None


def make_pages(base):
    """Run Jupyter Book on source/; replace html/ only by pages built without a warning."""
    made = base / "_build" / "html"
    index = made / "index.html"
    index.unlink(missing_ok=True)  # Jupyter Book can exit 0 without having written it
    log = base / "pages.log"
    command = "from jupyter_book.cli.main import main; main()"
    options = ["build", base / "source", "--path-output", base, "-n", "-W", "--keep-going"]
    print("pages: building", flush=True)
    with log.open("w") as stream:
        status = subprocess.run(
            [sys.executable, "-c", command, *options],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | {"NO_COLOR": "1"},
        ).returncode
    if status or not index.is_file():
        # Sphinx repeats no warning of a page it has read: the next build must read all again.
        shutil.rmtree(base / "_build" / ".doctrees", ignore_errors=True)
        lines = log.read_text().splitlines()
        shown = [line for line in lines if re.search("WARNING|ERROR|Error", line)][:20]
        shown = shown or lines[-20:]
        raise DiffEchoError("\n".join([f"{log}: the pages were not built", *shown]))
    fresh, old = base / "html.new", base / "html.old"
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, fresh)
    if (base / "html").exists():
        os.replace(base / "html", old)
    os.replace(fresh, base / "html")
    shutil.rmtree(old, ignore_errors=True)
    return base / "html" / "index.html"
