"""Where things are: shipped checkpoints and records in a checkout, and a place for what is made.

Every chapter. In a checkout the shipped files lie under `data/`, and what a run makes goes to `_build/`.
"""

import os
from pathlib import Path

from diffecho_utils import DiffEchoError


def root():
    """The checkout: $DIFFECHO_ROOT, the folder around an editable install, or one above the cwd."""
    here = Path(__file__).resolve().parent.parent
    candidates = [here, Path.cwd(), *Path.cwd().parents]
    if os.environ.get("DIFFECHO_ROOT"):
        candidates.insert(0, Path(os.environ["DIFFECHO_ROOT"]))
    for folder in candidates:
        if (folder / "_toc.yml").is_file() and (folder / "data").is_dir():
            return folder
    raise DiffEchoError(
        f"{Path.cwd()}: no checkout of the book here or above; work inside one, or set DIFFECHO_ROOT to it"
    )


def workspace():
    """Folder for what runs make (phantom, caches, build trees), created if needed: `_build`."""
    folder = root() / "_build"
    folder.mkdir(exist_ok=True)
    return folder


def checkpoint(world, model):
    """Folder of a shipped checkpoint, `data/checkpoints/<world>/<model>`."""
    return _shipped(Path("checkpoints") / world / model)


def record(world, profile, name):
    """Path of a shipped record, `data/results/<world>/<profile>/<name>.json`."""
    return _shipped(Path("results") / world / profile / f"{name}.json")


def features(world, profile, name):
    """Path of shipped feature vectors, `data/results/<world>/<profile>/<name>.safetensors`."""
    return _shipped(Path("results") / world / profile / f"{name}.safetensors")


def _shipped(relative):
    path = root() / "data" / relative
    if path.exists():
        return path
    beside = path.parent
    there = sorted(p.name for p in beside.iterdir()) if beside.is_dir() else []
    raise DiffEchoError(
        f"{path}: not shipped; beside it are {there or 'no files'}; check the checkout"
    )
