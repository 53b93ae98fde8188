"""The book: execute the chapters with papermill, then build the pages with Jupyter Book.

All chapters; `make book` calls it. The checkout is only
read (with `record` the chapters write their results to data/results);
everything else that is made goes to

    _build/book/<world>-<profile>/
        executed/     the chapters as papermill left them, each with the key of what went into it
        failed/       the partial notebook of a chapter that raised, for reading
        results/      what the chapters measured
        source/       what Sphinx reads; its notebooks/ is the chapters' working directory
        html/         the pages, replaced only by a build without warnings
        timings.json  seconds, date and hardware of each chapter
"""

import ast
import datetime
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill
import pdf
import publish

from diffecho_utils import DiffEchoError, assets, camus, files, profiles, releases, results
from diffecho_utils.__main__ import said
from diffecho_utils.chapter import phantom_folder

KERNEL = "diffecho-book"


def build(data, profile, *, chapters=None, record=False, force=False, jobs=1, root=None):
    """Execute what changed, build the pages, and return the path of their index.html.

    data: a folder in CAMUS's layout, or None for the phantom, written first where it is missing.
    chapters: names such as "03_unconditional" to execute; the others keep their last execution.
    record: the chapters write to data/results/<world>/<profile>, not to the build tree.
    force: execute even what did not change. jobs: so many chapters at the same time, which share
    the processor's cores between them. root: the checkout, found by default.

    A chapter is executed again when its code, the package, the profile, the data, the shipped files
    or the pinned requirements changed; new prose needs no execution, nor does a checkout that moved.
    Raises DiffEchoError for unusable data, for a parameter that a chapter does not declare, for a
    chapter that raises, and for pages with warnings; the last good pages then stay as they were.
    """
    root = Path(root or assets.root()).resolve()
    notebooks = _notebooks(root)
    chosen = _choose(chapters, notebooks)
    data = _data(data, profile)
    world = camus.world(data)
    base = root / "_build" / "book" / f"{world}-{profile}"
    shipped = root / "data" / "results" / world / profile
    parameters = {
        "data_root": str(data),
        "profile_name": profile,
        "results_dir": str(shipped if record else base / "results"),
    }
    inputs = _inputs(root, data, shipped if record else None) | {"profile": profile}
    plan = [_plan(path, base, parameters, inputs) for path in notebooks]

    print(f"book: world {world}, profile {profile}, data {data}", flush=True)
    publish.copy_pages(root, base)
    outcomes, waiting = {}, []
    for chapter in plan:
        before = publish.execution(chapter.executed)
        if chapter.name not in chosen:
            outcomes[chapter.name] = _unchosen(before, chapter.key)
        elif before and before["key"] == chapter.key and not force:
            outcomes[chapter.name] = "unchanged"
        else:
            outcomes[chapter.name] = "executed"
            waiting.append(chapter)
    _write_kernel(base / "jupyter", root, jobs)
    _execute_all(waiting, jobs, base, parameters, world)

    timings = {c.name: publish.execution(c.executed) for c in plan if c.executed.exists()}
    for timing in timings.values():
        del timing["key"]
    files.write_text(base / "timings.json", json.dumps(timings, indent=1) + "\n")
    publish.write_status(timings, notebooks, base / "source" / "book" / "_made")
    for chapter in plan:
        publish.publish(chapter, base / "source" / "notebooks")
    index = publish.make_pages(base)
    _print_table(outcomes, timings)
    print(f"open {index}", flush=True)
    return index


@dataclass(frozen=True)
class _Chapter:
    source: Path
    executed: Path
    key: str  # what the execution depends on, hashed

    @property
    def name(self):
        return self.source.stem


def jobs_at_once():
    """How many chapters suit this machine at the same time: 1 beside a GPU, else up to 4 by cores and memory."""
    import torch

    if torch.cuda.is_available():
        return 1
    gigabytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max(1, min(results.cores(), int(gigabytes / 5), 4))


def _notebooks(root):
    """Paths of the chapters, in the order of _toc.yml."""
    pages = [root / f"{page}.ipynb" for page in publish.toc(root)]
    return [path for path in pages if path.is_file()]


def _choose(chapters, notebooks):
    """The set of chapter names to execute."""
    names = [path.stem for path in notebooks]
    unknown = set(chapters or ()) - set(names)
    if unknown:
        raise DiffEchoError(f"no chapter {sorted(unknown)}; _toc.yml has {', '.join(names)}")
    return set(chapters or names)


def _data(data, profile):
    """The data folder, absolute and with a readable table of frames."""
    row = profiles.get(profile)
    if data is None:
        print(f"phantom: {row.phantom_patients} patients", flush=True)
        data = phantom_folder(row)
    data = releases.official(Path(data).expanduser().resolve())
    camus.read_table(data)
    return data


def _plan(path, base, parameters, inputs):
    """A chapter checked for its parameters, with the key of everything its execution depends on."""
    notebook = nbformat.read(path, as_version=4)
    missing = sorted(set(parameters) - _declared(notebook, path))
    if missing:
        raise DiffEchoError(
            f"{path}: no parameter {', '.join(missing)} in its cell tagged `parameters`, which has "
            f"{', '.join(sorted(_declared(notebook, path))) or 'none'}; declare it there"
        )
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    key = json.dumps({"code": code} | inputs, sort_keys=True)
    return _Chapter(path, base / "executed" / path.name, hashlib.sha256(key.encode()).hexdigest())


def _declared(notebook, path):
    """Names assigned in the one cell tagged `parameters`."""
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise DiffEchoError(f"{path}: {len(cells)} cells tagged `parameters`; there must be one")
    names = set()
    for node in ast.parse(cells[0].source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def _inputs(root, data, recording):
    """What all chapters may read, without a path or time of this machine: {what: {file: what tells it apart}}.

    Of real data, which are large, size and time stand for the content. recording: the folder that the
    chapters write records to, or None; those begin with a chapter's number and are no inputs.
    """
    shipped = [
        path
        for path in _files(root / "data")
        if path.parent != recording or not re.match(r"\d\d_", path.name)
    ]
    package = sorted((root / "diffecho_utils").glob("*.py"))
    requirements = list(root.glob("requirements.txt"))
    phantom = camus.world(data) == "phantom"
    return {
        "package": {path.name: _digest(path) for path in package + requirements},
        "shipped": {path.relative_to(root).as_posix(): _digest(path) for path in shipped},
        "data": {
            path.relative_to(data).as_posix(): _digest(path)
            if phantom
            else [path.stat().st_size, path.stat().st_mtime_ns]
            for path in _files(data)
        },
        "recording": recording is not None,
    }


def _files(folder):
    """Paths of the files below a folder, behind links too."""
    return [Path(at, name) for at, _, names in os.walk(folder, followlinks=True) for name in names]


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _unchosen(before, key):
    if before is None:
        return "not executed"
    return "unchanged" if before["key"] == key else "out of date"


def _execute_all(chapters, jobs, base, parameters, world):
    """Run the chapters, at most `jobs` of them at the same time.

    After a failure no other chapter is begun, and those that run are finished: they are kept. An
    interruption ends those that run.
    """
    failures, stop = [], threading.Event()

    def execute(number, chapter):
        if failures or stop.is_set():
            return
        before = publish.execution(chapter.executed)
        took = f", {before['seconds'] / 60:.1f} min last time" if before else ""
        print(f"[{number}/{len(chapters)}] {chapter.name}: executing{took}", flush=True)
        outcome = "done"
        try:
            _execute(chapter, base, parameters, world, stop)
        except DiffEchoError as error:
            failures.append(str(error))
            outcome = "failed"
        print(f"  {chapter.name}: {outcome}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for task in [pool.submit(execute, *each) for each in enumerate(chapters, start=1)]:
                task.result()
        finally:
            stop.set()
    if failures:
        raise DiffEchoError("\n".join(failures))


def _execute(chapter, base, parameters, world, stop):
    """Run a chapter into executed/, whole or not at all."""
    failed = base / "failed" / chapter.source.name
    partial = chapter.executed.with_suffix(".partial.ipynb")
    for folder in (failed.parent, partial.parent, Path(parameters["results_dir"])):
        folder.mkdir(parents=True, exist_ok=True)
    failed.unlink(missing_ok=True)
    shutil.copyfile(chapter.source, partial)
    start = time.monotonic()
    trouble = _papermill(chapter.source, partial, parameters, base, stop)
    notebook = nbformat.read(partial, as_version=4)
    if trouble:
        os.replace(partial, failed)
        raise DiffEchoError(
            f"{chapter.name}: {_raised(notebook) or trouble}; the notebook up to there is {failed}; "
            "the pages stay as they were"
        )
    partial.unlink()
    notebook.metadata["diffecho"] = {
        "key": chapter.key,
        "seconds": round(time.monotonic() - start, 1),
        "date": datetime.date.today().isoformat(),
        "hardware": results.hardware(),
        "world": world,
        "profile": parameters["profile_name"],
    }
    files.write_text(chapter.executed, nbformat.writes(notebook) + "\n")


def _papermill(source, out, parameters, base, stop):
    """Execute `source` into `out` in a process of its own; what went wrong in words, or None.

    A line a minute says where it is. It is interrupted, and its kernel with it, when `stop` is set.
    """
    command = [sys.executable, "-m", papermill.__name__, source, out, "--no-progress-bar"]
    command += ["--log-output"]  # names the cells in the log
    command += ["--kernel", KERNEL, "--language", "python"]
    command += ["--cwd", base / "source" / "notebooks"]
    for parameter in parameters.items():
        command += ["--parameters_raw", *parameter]
    start, minutes, log = time.monotonic(), 0, base / "failed" / f"{source.stem}.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=os.environ | {"JUPYTER_PATH": str(base / "jupyter")},
            start_new_session=True,  # a terminal's interruption comes by way of `stop` alone
        )
    while process.poll() is None:
        if stop.wait(0.2):
            process.send_signal(signal.SIGINT)
            process.wait()
        if time.monotonic() - start > 60 * (minutes + 1):
            minutes += 1
            cell = log.read_text().count("Executing Cell")
            print(f"  {source.stem}: {minutes} min, cell {cell}", flush=True)
    said = log.read_text().strip().rpartition("\n")[2]
    log.unlink()
    if process.returncode:
        return f"its process was lost ({said}), most often for want of memory; a smaller PROFILE needs less"


def _raised(notebook):
    """Which cell of an execution raised what, in words; None where none did."""
    for cell in notebook.cells:
        if cell.metadata.get("papermill", {}).get("exception"):
            line = next((line for line in cell.source.splitlines() if line.strip()), "")
            error = next(output for output in cell.outputs if output.output_type == "error")
            return f"the cell `{line}` raised " + f"{error.ename}: {error.evalue}".splitlines()[0]


def _write_kernel(folder, root, jobs):
    """A kernel of this very Python and checkout, whatever kernels and settings the user has.

    With several jobs each gets its share of the cores, but for a number of threads set outside.
    """
    threads = {"OMP_NUM_THREADS": str(max(1, results.cores() // jobs))} if jobs > 1 else {}
    environment = threads | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
        "PYTHONHASHSEED": "0",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "IPYTHONDIR": str(folder / "ipython"),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "DIFFECHO_PAGES": "1",  # pictures in place of sliders
        "TQDM_DISABLE": "1",  # its bars become widgets, which a page cannot show
    }
    environment |= {name: os.environ[name] for name in threads if name in os.environ}
    argv = [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "--log-level=ERROR"]
    spec = {
        "argv": [*argv, "-f", "{connection_file}"],
        "display_name": "The book's Python",
        "language": "python",
        "env": environment,
    }
    path = folder / "kernels" / KERNEL / "kernel.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(spec))


def _print_table(outcomes, timings):
    width = max((len(name) for name in outcomes), default=0)
    for name, outcome in outcomes.items():
        seconds = f"{timings[name]['seconds']:7.1f} s" if name in timings else f"{'-':>9}"
        print(f"  {name:<{width}}  {seconds}  {outcome}")
    executed = [name for name, outcome in outcomes.items() if outcome == "executed"]
    total = sum(timings[name]["seconds"] for name in executed)
    print(f"  {'executed now':<{width}}  {total:7.1f} s")


def main(arguments=None):
    """The command line of `make book` and `make pdf`."""
    parser = ArgumentParser(description="Execute the chapters and build the pages.")
    parser.add_argument("--data", help="CAMUS in any form; default: the phantom")
    parser.add_argument("--profile", default="cpu", choices=profiles.PROFILES)
    parser.add_argument("--chapter", nargs="*", help="only these, e.g. 01_camus_data")
    parser.add_argument(
        "--record", action="store_true", help="write what is measured to data/results"
    )
    parser.add_argument("--force", action="store_true", help="execute what did not change, too")
    parser.add_argument("--pdf", action="store_true", help="print the pages into one PDF file, too")
    parser.add_argument(
        "--jobs", type=int, help="chapters at the same time; default: what suits this machine"
    )
    options = parser.parse_args(arguments)
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"argument --jobs: {options.jobs}: must be at least 1")

    def run():
        index = build(
            options.data,
            options.profile,
            chapters=options.chapter,
            record=options.record,
            force=options.force,
            jobs=options.jobs or jobs_at_once(),
        )
        if options.pdf:
            print(f"open {pdf.print_pages(index.parent, index.parent.parent / 'book.pdf')}")

    return said(run)


if __name__ == "__main__":
    sys.exit(main())
