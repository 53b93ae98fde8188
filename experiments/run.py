"""Makes what lies in data/results: computes an experiment's rows, then its record.

    python experiments/run.py strength --data /path/to/camus          (--help: what it measures)
    python experiments/run.py all --data /path/to/camus --processes 2     (every record, in order)

An experiment is a module of this folder:

    rows(world, **options)      {row: settings}, the most telling first; options of the command line
    compute(world, **settings)  the values of one row
    collect(world, found)       {record: values} of {row: values}; without it the rows become a zip
    SEEDS, SPLIT                of rows without a `seed`, of records; WORLD = "phantom": it is not made on --data
    USES                        shipped networks that rows use, beside the `model` of their settings

A row is a record of its own in _build/experiments/NAME, whole or not there. The name of its file ends in
a hash of what fixes it: data, profile, settings (of a path: what lies there), weights; not the code: after
a change of that, --again. Rows that are there are kept: a command can be killed at any moment and repeated,
and several can run side by side, since who computes a row holds a lock that does not outlive the process.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from filelock import FileLock, Timeout
from world import World

from diffecho_utils import DiffEchoError, assets, files, profiles, results

RECORDS = "strength autoencoders generators memorisation sampling few_steps phase ablations "
RECORDS += (
    "segmentation classification pretrained coverage phantom_realism phantom_ablation gallery "
)
RECORDS += "paper_scale"
SPEEDS = "phantom_speed training_speed recipes trainings"  # tables that are only printed
opened = functools.cache(World)


def main(arguments=None):
    """Run what the words name; 1 where an experiment failed, which does not keep the others from running."""
    words = sys.argv[1:] if arguments is None else arguments
    name, *words = map(str, words or ["--help"])
    if name in ("-h", "--help"):
        print(f"{__doc__}\nRecords: {RECORDS}\nSpeeds: {SPEEDS}")
        return 0
    failed = False
    for one in RECORDS.split() if name == "all" else [name]:
        try:
            run(one, words, whole=name != "all")
        except DiffEchoError as error:
            failed = True
            print(f"error: {one}: {error}", file=sys.stderr)
        except Exception:
            failed = True
            traceback.print_exc()
    return int(failed)


def run(name, words, whole=True):
    """Compute the rows asked for, then write the records if all rows are there; whole: with its own options."""
    if name not in f"{RECORDS} {SPEEDS}".split() and not importlib.util.find_spec(name):
        raise DiffEchoError(f"no such experiment; there are {RECORDS} {SPEEDS}")
    experiment = importlib.import_module(name)
    parameters = list(inspect.signature(experiment.rows).parameters.values())[1:]
    own = {parameter.name: parameter.default for parameter in parameters} if whole else {}
    asked = parser(experiment, own).parse_args(words)
    on_phantom = getattr(experiment, "WORLD", None) == "phantom"
    world = opened(None if on_phantom else asked.data, asked.profile, asked.out)
    facts = {"world": world.name, "profile": asked.profile, "split": experiment.SPLIT}
    facts["command"] = command_of(name, words)
    rows = experiment.rows(world, **{option: getattr(asked, option) for option in own})
    paths = {row: path_of(experiment, world, row, settings) for row, settings in rows.items()}
    todo = [row for row in rows if re.search(asked.only, row)]
    for row in todo if asked.again else ():
        paths[row].unlink(missing_ok=True)
    if asked.processes > 1:
        side_by_side(name, [word for word in words if word != "--again"], asked.processes)
    for patience in (0, -1):  # what nobody is at; then what others were at, once they let go
        for row in todo:
            path = paths[row]
            with contextlib.suppress(Timeout), FileLock(path.with_suffix(".lock"), patience):
                if not path.is_file():
                    write_row(experiment, world, row, rows[row], path, facts)
    lost = [row for row in rows if not paths[row].is_file()]
    if lost:
        print(f"{name}: {len(lost)} of {len(rows)} rows are not there yet (first: {lost[0]})")
    elif not asked.rows_only:
        records = {row: results.load(path) for row, path in paths.items()}
        write_records(experiment, world, records, facts)


def parser(experiment, own):
    """The options of all experiments, and `own`, {option: default}, those of one."""
    parser = argparse.ArgumentParser(
        prog=f"run.py {experiment.__name__}",
        description=experiment.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="CAMUS folder; default: a phantom in _build")
    parser.add_argument("--profile", default="cpu", choices=[*profiles.PROFILES])
    parser.add_argument("--out", type=Path, help="default: data/results/<world>/<profile>")
    parser.add_argument("--only", default="", metavar="REGEX", help="rows to compute")
    parser.add_argument("--processes", type=int, default=1, help="to share the rows among")
    parser.add_argument("--again", action="store_true", help="compute rows that are there, too")
    parser.add_argument("--rows-only", action="store_true", help="write no record")
    for option, default in own.items():
        several = isinstance(default, tuple)
        kind = type(default[0] if several else default)
        kind = Path if issubclass(kind, Path) else kind
        name, count = f"--{option.replace('_', '-')}", "+" if several else None
        parser.add_argument(name, type=kind, nargs=count, default=default)
    return parser


def path_of(experiment, world, row, settings):
    """Where a row lies: its name ends in 16 digits that change with whatever fixes the row."""
    used = [*getattr(experiment, "USES", ()), settings.get("model")]
    used += [value for value in settings.values() if isinstance(value, Path)]
    digests = [world.digest(thing) for thing in used if thing]
    fixed = [world.digest(), str(world.profile), settings, digests]
    key = hashlib.sha256(json.dumps(fixed, default=lambda path: path.name).encode()).hexdigest()
    folder = assets.workspace() / "experiments" / experiment.__name__
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{file_name(row)}-{key[:16]}.json"


def file_name(row):
    return re.sub(r"[^a-z0-9.-]+", "_", row.lower())


def command_of(name, words):
    """The command for a record, folders by their names alone."""
    words = [Path(word).name if os.sep in word else word for word in words]
    return shlex.join(["python", "experiments/run.py", name, *words])


def side_by_side(name, words, processes):
    """The same command in several processes that share the cores; what they leave, this one does."""
    command = [sys.executable, __file__, name, *words, "--processes", "1", "--rows-only"]
    threads = str(max(1, results.cores() // processes))
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    for process in [subprocess.Popen(command, env=environment) for _ in range(processes)]:
        process.wait()


def write_row(experiment, world, row, settings, path, facts):
    """Compute a row and write it, in full precision."""
    print(f"{experiment.__name__}: {row}", flush=True)
    started = time.perf_counter()
    values = experiment.compute(world, **settings)
    values = {"seconds": round(time.perf_counter() - started, 1)} | values
    record = results.provenance(facts["command"]) | facts | {"name": path.stem, "values": values}
    record["licence"] = results.LICENCES.get(world.name, "of the data")
    record["seeds"] = [settings["seed"]] if "seed" in settings else experiment.SEEDS
    files.write_text(path, json.dumps(record, indent=1, default=lambda x: x.tolist()) + "\n")


def write_records(experiment, world, rows, facts):
    """The records of an experiment, or the zip of its `rows`, {name: record}."""
    if not hasattr(experiment, "collect"):
        with tempfile.TemporaryDirectory() as folder:
            for row, record in rows.items():
                save(folder, file_name(row), record["values"], [record], facts)
            print("wrote", results.pack(folder, world.out / f"{experiment.__name__}.zip"))
        return
    found = {row: record["values"] for row, record in rows.items()}
    for values in found.values():
        del values["seconds"]
    for name, values in experiment.collect(world, found).items():
        print("wrote", save(world.out, name, values, list(rows.values()), facts))


def save(folder, name, values, rows, facts):
    """Write a record, which says of its making what its rows say of theirs; returns its path."""
    seeds = sorted({seed for row in rows for seed in row["seeds"]})
    path = results.save(folder, name, values, seeds=seeds, **facts)
    made = results.shared(rows) | {"versions": rows[0]["versions"]} if rows else {}
    files.write_text(path, json.dumps(results.load(path) | made, indent=1) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
