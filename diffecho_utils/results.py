"""Numbers with their provenance: what a chapter measured, where, when, on what, with which code.

Every chapter. A page never holds a typed number: it computes it, or reads it from a record here.
A record is one JSON file, `data/results/<world>/<profile>/<name>.json`.
"""

import datetime
import json
import math
import os
import platform
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

from diffecho_utils import DiffEchoError, __version__, files

LICENCES = {"camus": "CC-BY-NC-SA-4.0", "phantom": "CC0-1.0"}
ROOT = Path(__file__).resolve().parents[1]  # the checkout, or where packages are installed


def save(directory, name, values, *, world, profile, command, seeds=(), split=None):
    """Write `values` (a JSON-able dict; arrays and NaN allowed) with their provenance; returns the path."""
    record = {
        **provenance(command),
        "name": name,
        "world": world,
        "licence": LICENCES.get(world, "of the data"),
        "profile": profile,
        "split": split,
        "seeds": list(seeds),
        "values": values,
    }
    path = Path(directory) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(_plain(record), indent=1, allow_nan=False) + "\n")
    return path


def load(path):
    """The record at `path`: a dict with date, hardware, command, commit, seeds, ... and "values"."""
    path = Path(path)
    if not path.is_file():
        raise DiffEchoError(
            f"{path}: no such record; `python book/tools/build.py --record` makes it"
        )
    return parse(path.read_bytes(), path)


def parse(text, name):
    """The record in a JSON text; `name` tells where it is from."""
    try:
        record = json.loads(text)
    except ValueError as error:
        raise DiffEchoError(
            f"{name}: not a record ({error}); restore it from the repository"
        ) from None
    missing = {"name", "date", "hardware", "command", "commit", "values"} - set(record)
    if missing:
        raise DiffEchoError(f"{name}: lacks {sorted(missing)}; restore it from the repository")
    return record


def pack(folder, path):
    """The records (*.json) in `folder` as one zip at `path`, the same bytes for the same records."""
    records = sorted(Path(folder).glob("*.json"))
    if not records:
        raise DiffEchoError(f"{folder}: no record (*.json) to pack; run the experiment first")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.draft(path) as beside, zipfile.ZipFile(beside, "w", compresslevel=9) as archive:
        for record in records:  # ZipInfo: without the time of the file
            archive.writestr(zipfile.ZipInfo(record.name), record.read_bytes(), zipfile.ZIP_BZIP2)
    return path


def shared(records):
    """What several records say of their making, as one; where they differ, each entry once."""
    keys = ("date", "hardware", "command", "commit", "world", "licence", "profile")
    return {key: ", ".join(sorted({record[key] for record in records})) for key in keys}


def describe(record):
    """One line for a caption: "Recorded 2026-11-22 on ..., camus, profile cpu: `command`"."""
    several = "s" if "," in record["commit"] else ""
    return (
        f"Recorded {record['date']} on {record['hardware']}, {record['world']}, "
        f"profile {record['profile']}, commit{several} {record['commit']}: `{record['command']}`"
    )


def provenance(command):
    """Date, hardware, command, commit and versions of this run, as a JSON-able dict."""
    packages = ("torch", "diffusers", "transformers", "monai", "torchmetrics", "numpy")
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "command": command,
        "commit": _short(revision()),
        "versions": {
            "diffecho_utils": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
    }


def hardware():
    """This machine in words, e.g. "2-core CPU (AMD EPYC)" or "NVIDIA H100 80GB HBM3"."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    kind = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{cores()}-core CPU ({kind})"


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def code():
    """Which code runs, in one line: "diffecho_utils 0.1.0, commit 0123abc", "+" where files differ from it."""
    return f"diffecho_utils {__version__}, commit {_short(revision())}"


def revision():
    """The commit this package is of: 40 digits, "+" behind them where a file of it differs; None if unknown.

    Told by git in a checkout of this project; else by commit.txt, into which git writes the commit
    where GitHub makes an archive of it; else by what pip notes of a repository it installed from.
    """
    if (ROOT / ".git").exists() and (ROOT / "_toc.yml").is_file():
        commit = git("rev-parse", "HEAD")
        return commit and commit + ("+" if git("status", "--porcelain", "diffecho_utils") else "")
    exported = (ROOT / "diffecho_utils" / "commit.txt").read_text().strip()
    if not exported.startswith("$"):
        return exported
    for note in ROOT.glob("diffecho_utils-*.dist-info/direct_url.json"):
        return json.loads(note.read_text()).get("vcs_info", {}).get("commit_id")
    return None


def git(*command):
    """What git answers in this checkout, stripped; None where there is no git, or it fails."""
    here = ["git", "-C", ROOT, f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}"]
    try:
        done = subprocess.run([*here, *command], capture_output=True, text=True)
    except OSError:
        return None
    return None if done.returncode else done.stdout.strip()


def _short(commit):
    return f"unknown ({__version__})" if commit is None else commit[:7] + commit[40:]


def _plain(value):
    """Numpy values as Python's, NaN and infinities as None, floats with six significant digits."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
