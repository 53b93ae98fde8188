"""Where things are: shipped checkpoints and records, and a place for what is made.

Every chapter. In a checkout the shipped files lie under `data/`, and what a run makes goes to `_build/`.
Where the package is installed without one (Colab), pooch fetches a shipped file when it is first asked
for, from the commit that the package is of, and checks it against the SHA-256 in `registry.txt`. After a
change under `data/`, `make registry` writes it anew.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pooch

from diffecho_utils import DiffEchoError, __version__, files, results

REGISTRY = Path(__file__).with_name("registry.txt")  # lines "path sha256"


def root():
    """The checkout: $DIFFECHO_ROOT, the folder around an editable install, or one above the cwd."""
    folder = _checkout()
    if folder is None:
        raise DiffEchoError(
            f"{Path.cwd()}: no checkout of the book here or above; work inside one, or set DIFFECHO_ROOT to it"
        )
    return folder


def workspace():
    """Folder for what runs make (phantom, caches, build trees), created if needed.

    `_build` in the checkout; without one, in the current folder.
    """
    folder = (_checkout() or Path.cwd()) / "_build"
    folder.mkdir(exist_ok=True)
    return folder


def checkpoint(world, model):
    """Folder of a shipped checkpoint, `data/checkpoints/<world>/<model>`; what it builds on lies beside it."""
    folder = shipped(f"checkpoints/{world}/{model}")
    if _checkout() is None:
        made = files.read_json(folder / "training.json", "delete it, to fetch it again")
        for needed in made.get("needs", {}).values():
            checkpoint(*Path(os.path.normpath(folder / needed["path"])).parts[-2:])
    return folder


def record(world, profile, name):
    """Path of a shipped record, `data/results/<world>/<profile>/<name>.json`."""
    return shipped(f"results/{world}/{profile}/{name}.json")


def features(world, profile, name):
    """Path of shipped feature vectors, `data/results/<world>/<profile>/<name>.safetensors`."""
    return shipped(f"results/{world}/{profile}/{name}.safetensors")


def shipped(relative):
    """Path of a shipped file or folder, given relative to `data/`; fetched where there is no checkout.

    Raises DiffEchoError where nothing of that name is shipped, and for a file that cannot be fetched or
    arrives damaged, of which nothing is kept.
    """
    checkout = _checkout()
    if checkout is None:
        return _fetched(relative)
    path = checkout / "data" / relative
    if not path.exists():
        beside = sorted(other.name for other in path.parent.glob("*"))
        raise DiffEchoError(
            f"{path}: not shipped; beside it are {beside or 'no files'}; check the checkout"
        )
    return path


def address():
    """Where the shipped files lie: $DIFFECHO_DATA_URL, or this package's commit in the repository.

    Of a package that does not know its commit: the tag of its version.
    """
    commit = (results.revision() or f"v{__version__}").rstrip("+")
    there = f"https://raw.githubusercontent.com/diffecho-book/diffecho-book/{commit}/data/"
    return os.environ.get("DIFFECHO_DATA_URL", there)


def _checkout():
    named = [Path(os.environ["DIFFECHO_ROOT"])] if os.environ.get("DIFFECHO_ROOT") else []
    for folder in [*named, Path(__file__).resolve().parents[1], Path.cwd(), *Path.cwd().parents]:
        if (folder / "_toc.yml").is_file() and (folder / "data").is_dir():
            return folder
    return None


def _fetched(relative):
    """The file or folder in pooch's cache, from `address`."""
    store = pooch.create(
        path=pooch.os_cache("diffecho"),
        base_url=address().rstrip("/") + "/",
        env="DIFFECHO_CACHE",
        retry_if_failed=2,
    )
    store.load_registry(REGISTRY)
    names = [name for name in store.registry if f"{name}/".startswith(f"{relative}/")]
    if not names:
        above = relative[: relative.rfind("/") + 1]
        listed = [name for name in store.registry if name.startswith(above)]
        beside = sorted({name.removeprefix(above).split("/")[0] for name in listed})
        raise DiffEchoError(f"data/{relative}: not shipped; beside it are {beside or 'no files'}")
    pooch.get_logger().setLevel("WARNING")
    for name in names:  # before the threads, which would make the same one twice
        (store.abspath / name).parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: _fetch(store, name), names))
    return store.abspath / relative


def _fetch(store, name):
    try:
        store.fetch(name)
    except (OSError, ValueError) as error:  # the network's errors are OSErrors
        text = " ".join(str(error).split())
        said = f"not fetched ({text[:200]})"
        if "does not match the known hash" in text:
            said = "what arrived is damaged, or another version (its SHA-256 is not the registered one)"
        raise DiffEchoError(
            f"{store.get_url(name)}: {said}; nothing was kept. Try again; if it stays so, install the "
            "package anew, so that its list of files is that of the address"
        ) from None
