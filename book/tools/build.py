"""The book: execute the chapters with papermill, then build the pages with Jupyter Book.

`make book` calls it. The checkout is only read (with `record` the chapters write their results to
data/results); everything else that is made goes to

    _build/book/<world>-<profile>/
        executed/     the chapters as papermill left them, each with the key of what went into it
        failed/       the partial notebook of a chapter that raised, for reading
        results/      what the chapters measured
        source/       what Sphinx reads; its notebooks/ is the chapters' working directory
        html/         the pages, replaced only by a build without warnings
        timings.json  seconds, date and hardware of each chapter
"""

import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import nbformat
import papermill
import publish
import torch
from registry import hashes
from sphinx_external_toc.parsing import parse_toc_yaml

from diffecho_utils import DiffEchoError, assets, files, profiles, results
from diffecho_utils.__main__ import said
from diffecho_utils.chapter import begin


def build(data, profile, *, chapters=None, record=False, force=False, jobs=1, root=None):
    """Execute what changed, build the pages, and return the path of their index.html.

    data: CAMUS in any form, or None for the phantom. chapters: names such as "03_unconditional" to
    execute; the others keep their last execution. record: the chapters write to data/results.
    force: execute even what did not change. jobs: so many chapters at the same time, which share
    the processor's cores. root: the checkout, found by default.

    A chapter is executed again when its code, the package, the profile, the data, the shipped files
    or the pinned requirements changed; new prose needs no execution, nor does a checkout that moved.
    Raises DiffEchoError for unusable data, for a parameter that a chapter does not declare, for a
    chapter that raises, and for pages with warnings; the last good pages then stay as they were.
    """
    root = Path(root or assets.root()).resolve()
    pages = [root / f"{page}.ipynb" for page in parse_toc_yaml(root / "_toc.yml")]
    paths = {path.stem: path for path in pages if path.is_file()}
    unknown = set(chapters or ()) - set(paths)
    if unknown:
        raise DiffEchoError(f"no chapter {sorted(unknown)}; _toc.yml has {', '.join(paths)}")
    print(f"book: {data or 'the phantom, written where it is missing'}", flush=True)
    table = begin(profile, data and Path(data).expanduser().resolve())[1]
    data, world = Path(table.attrs["root"]), table.attrs["world"]
    base = root / "_build" / "book" / f"{world}-{profile}"
    records = root / "data" / "results" / world / profile if record else base / "results"
    parameters = {"data_root": data, "profile_name": profile, "results_dir": records}
    inputs = [profile, record, _inputs(root, data, world, records)]
    plan = [_chapter(path, base, parameters, inputs) for path in paths.values()]
    outcomes = {each: _outcome(each, chapters or paths, force) for each in plan}

    publish.copy_pages(root, base)
    waiting = [each for each, outcome in outcomes.items() if outcome == "executed"]
    _execute_all(waiting, jobs, base, parameters, {"world": world, "profile": profile})

    timings = {each.name: each.execution() for each in plan if each.executed.exists()}
    files.write_text(base / "timings.json", json.dumps(timings, indent=1) + "\n")
    publish.write_status(timings, paths, base / "source" / "book" / "_made" / "status.md")
    if "11_claims" in paths:
        verdicts = results.load(assets.record("camus", "cpu", "11_claims"))
        publish.write_claims(verdicts, base / "source" / "book" / "_made" / "claims.md")
    for each in plan:
        publish.publish(each, base / "source" / "notebooks")
    index = publish.make_pages(base)
    for each, outcome in outcomes.items():
        took = f"{timings[each.name]['seconds']:.1f} s" if each.name in timings else "-"
        print(f"  {each.name:<32} {took:>9}  {outcome}")
    now = sum(timings[each.name]["seconds"] for each in waiting)
    print(f"  {'executed now':<32} {now:>7.1f} s\nopen {index}", flush=True)
    return index


def _inputs(root, data, world, records):
    """What all chapters may read, as lines of names and hashes without a path or time of this machine.

    Of real data, which are large, size and time stand for the content. What chapters write to
    `records` begins with a chapter's number and is no input.
    """
    package = root / "diffecho_utils"
    code = [*package.glob("*.py"), *package.glob("*.md"), *root.glob("requirements.txt")]
    shipped = set(_files(root / "data")) - set(records.glob("[0-9][0-9]_*"))

    def told_apart(path):
        status = path.stat()
        size_and_time = f"{status.st_size} {status.st_mtime_ns}".encode()
        return path.read_bytes() if world == "phantom" else size_and_time

    return [*hashes(root, [*code, *shipped]), *hashes(data, _files(data), told_apart)]


def _files(folder):
    """Paths of the files below a folder, behind links too."""
    return [Path(at, name) for at, _, names in os.walk(folder, followlinks=True) for name in names]


def _chapter(path, base, parameters, inputs):
    """A chapter, checked for its parameters, with the key of everything its execution depends on."""
    declared = papermill.inspect_notebook(path)
    missing = sorted(set(parameters) - set(declared))
    if missing:
        raise DiffEchoError(
            f"{path}: no parameter {', '.join(missing)} in its cell tagged `parameters`, which has "
            f"{', '.join(sorted(declared)) or 'none'}; declare it there"
        )
    cells = nbformat.read(path, as_version=4).cells
    depends = json.dumps([[c.source for c in cells if c.cell_type == "code"], *inputs])
    key = hashlib.sha256(depends.encode()).hexdigest()
    return publish.Chapter(path.stem, path, base / "executed" / path.name, key)


def _outcome(chapter, chosen, force):
    """What this build does with a chapter, in a word or two."""
    before = chapter.execution()
    changed = before is None or before["key"] != chapter.key
    if chapter.name in chosen and (changed or force):
        return "executed"
    return "unchanged" if not changed else "out of date" if before else "not executed"


def _execute_all(chapters, jobs, base, parameters, noted):
    """Run the chapters, at most `jobs` of them at the same time.

    After a failure no other chapter is begun, and those that run are finished: they are kept. An
    interruption ends those that run.
    """
    for folder in ("executed", "failed", "source/notebooks", parameters["results_dir"]):
        (base / folder).mkdir(parents=True, exist_ok=True)
    environment = _environment(base, jobs)
    failures, stop = [], threading.Event()

    def execute(number, chapter):
        if failures or stop.is_set():
            return
        before = chapter.execution()
        took = f", {before['seconds'] / 60:.1f} min last time" if before else ""
        print(f"[{number}/{len(chapters)}] {chapter.name}: executing{took}", flush=True)
        trouble = _execute(chapter, base, parameters, noted, environment, stop)
        if trouble:
            failures.append(trouble)
        print(f"  {chapter.name}: {'failed' if trouble else 'done'}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            list(pool.map(execute, count(1), chapters))
        finally:
            stop.set()
    if failures:
        raise DiffEchoError("\n".join(failures))


def _environment(base, jobs):
    """Of a chapter's process, whatever kernels and settings the user has.

    With several jobs each gets its share of the cores, but for a number of threads set outside.
    """
    threads = {"OMP_NUM_THREADS": str(max(1, results.cores() // jobs))} if jobs > 1 else {}
    here = str(base.parents[2]), os.environ.get("PYTHONPATH")
    fixed = {
        "JUPYTER_PATH": str(Path(sys.prefix, "share", "jupyter")),  # so python3 is this very Python
        "IPYTHONDIR": str(base / "ipython"),
        "PYTHONPATH": os.pathsep.join(filter(None, here)),
        "PYTHONHASHSEED": "0",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "TOKENIZERS_PARALLELISM": "false",
        "DIFFECHO_PAGES": "1",  # pictures in place of sliders
        "TQDM_DISABLE": "1",  # its bars become widgets, which a page cannot show
    }
    return {"HF_HUB_OFFLINE": "1"} | threads | os.environ | fixed


def _execute(chapter, base, parameters, noted, environment, stop):
    """Run a chapter into executed/, whole or not at all; what went wrong in words, or None."""
    out = base / "failed" / chapter.source.name  # stays there if it raises
    out.write_bytes(chapter.source.read_bytes())
    start = time.monotonic()
    lost = _papermill(out, parameters, base / "source" / "notebooks", environment, stop)
    notebook = nbformat.read(out, as_version=4)
    if lost:
        return (
            f"{chapter.name}: {_raised(notebook) or lost}; the notebook up to there is {out}; "
            "the pages stay as they were"
        )
    notebook.metadata["diffecho"] = noted | {
        "key": chapter.key,
        "seconds": round(time.monotonic() - start, 1),
        "date": datetime.date.today().isoformat(),
        "hardware": results.hardware(),
    }
    files.write_text(chapter.executed, nbformat.writes(notebook) + "\n")
    out.unlink()


def _papermill(path, parameters, cwd, environment, stop):
    """Execute a notebook in place, in a process of its own; the last that it said if it failed.

    A line a minute says where it is. It is interrupted, and its kernel with it, when `stop` is set.
    """
    command = [sys.executable, "-m", "papermill", path, path, "--cwd", cwd, "--kernel", "python3"]
    command += ["--no-progress-bar", "--log-output"]  # the log names the cells
    for parameter in parameters.items():
        command += ["--parameters_raw", *parameter]
    start, minutes, log = time.monotonic(), 0, path.with_suffix(".log")
    with log.open("w") as stream:
        # in a session of its own: a terminal's interruption comes by way of `stop` alone
        options = {"stdin": subprocess.DEVNULL, "stdout": stream, "start_new_session": True}
        process = subprocess.Popen(command, stderr=stream, env=environment, **options)
    while process.poll() is None:
        if stop.wait(0.2):
            process.send_signal(signal.SIGINT)
            process.wait()
        if time.monotonic() - start > 60 * (minutes + 1):
            minutes += 1
            cell = log.read_text().count("Executing Cell")
            print(f"  {path.stem}: {minutes} min, cell {cell}", flush=True)
    last = log.read_text().strip().rpartition("\n")[2]
    log.unlink()
    if process.returncode:
        return f"its process was lost ({last}), most often for want of memory; a smaller PROFILE needs less"


def _raised(notebook):
    """Which cell of an execution raised what, in words; None where none did."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                line = cell.source.strip().splitlines()[0]
                return f"the cell `{line}` raised {output.ename}: {output.evalue}".splitlines()[0]


def jobs_at_once():
    """How many chapters suit this machine at the same time: 1 beside a GPU, else up to 4 by cores and memory."""
    if torch.cuda.is_available():
        return 1
    gigabytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max(1, min(results.cores(), int(gigabytes / 5), 4))


def main():
    """The command line of `make book` and `make pdf`."""
    parser = ArgumentParser(description="Execute the chapters and build the pages.")
    option = parser.add_argument
    option("--data", help="CAMUS in any form; default: the phantom")
    option("--profile", default="cpu", choices=profiles.PROFILES)
    option("--chapter", nargs="*", dest="chapters", help="only these, e.g. 01_camus_data")
    option("--record", action="store_true", help="write what is measured to data/results")
    option("--force", action="store_true", help="execute what did not change, too")
    option("--pdf", action="store_true", help="print the pages into one PDF file, too")
    suits = jobs_at_once()
    option("--jobs", type=int, default=suits, help=f"chapters at the same time; default: {suits}")
    options = vars(parser.parse_args())
    printed, jobs = options.pop("pdf"), options["jobs"]
    if jobs < 1:
        parser.error(f"argument --jobs: {jobs}: must be at least 1")

    def run():
        index = build(**options)
        if printed:
            import pdf  # needs a browser

            print(f"open {pdf.print_pages(index.parent, index.parent.parent / 'book.pdf')}")

    return said(run)


if __name__ == "__main__":
    sys.exit(main())
