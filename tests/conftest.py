"""Fixtures shared by the tests: a tiny phantom, a breakable copy of it, and the real frames if given."""

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import build
import pytest
import torch
from filelock import FileLock

from diffecho_utils import assets, camus, data, phantom, profiles, results

REAL = Path(__file__).resolve().parents[2] / "shared" / "camus"
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))

threads = max(1, results.cores() // WORKERS)
torch.set_num_threads(threads)
if WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of what the tests start


def pytest_collection_modifyitems(items):
    """For several workers: the files that take longest first, the pages once the book is there."""
    order = {"test_notebooks": 0, "test_colab": 1, "test_pages": 3}
    items.sort(key=lambda item: order.get(item.path.stem, 2))


class Quiet(SimpleHTTPRequestHandler):
    """Serves the files of a folder and says nothing."""

    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def serve():
    """`with serve(folder) as address`: a loopback server of its files."""

    @contextlib.contextmanager
    def serve(folder, handler=Quiet):
        made = functools.partial(handler, directory=folder)
        with ThreadingHTTPServer(("127.0.0.1", 0), made) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()

    return serve


def outside():
    """The environment's variables without what leads to the checkout."""
    hidden = ("PYTHONPATH", "DIFFECHO_")
    return {name: value for name, value in os.environ.items() if not name.startswith(hidden)}


def environment(folder, packages=True):
    """A new Python environment in `folder`, with the packages there are here: (python, site-packages)."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    if packages:
        (site / "already_there.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python", site


@pytest.fixture(scope="session")
def phantom_root(tmp_path_factory):
    """A phantom of ten patients."""
    return phantom.write(tmp_path_factory.mktemp("data") / "phantom", patients=10, seed=7)


@pytest.fixture
def broken_root(phantom_root, tmp_path):
    """A copy of the phantom that a test may damage."""
    return Path(shutil.copytree(phantom_root, tmp_path / "broken"))


@pytest.fixture(scope="session")
def real_root():
    """The real CAMUS frames beside the checkout; tests that need them skip where they are not."""
    if not REAL.is_dir():
        pytest.skip("real CAMUS frames are not at ../shared/camus")
    return REAL


@pytest.fixture(scope="session")
def built():
    """Folder of the whole book, made once at smoke size from the real frames, or the phantom without them."""
    note = assets.workspace() / "built-by-tests"  # which run of the tests, and where
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", "")
    with FileLock(note.with_suffix(".lock")):
        if run and note.exists() and note.read_text().startswith(run):
            return Path(note.read_text().removeprefix(run))  # by another worker
        root = REAL if REAL.is_dir() else None
        folder = build.build(root, "smoke", force=True).parent.parent
        note.write_text(f"{run}{folder}")
    return folder


@pytest.fixture(scope="session")
def smoke():
    return profiles.get("smoke")


@pytest.fixture(scope="session")
def frames(phantom_root, smoke):
    """All frames of the phantom at the smoke profile's size."""
    return data.load_frames(camus.read_table(phantom_root), smoke)
