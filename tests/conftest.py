"""Fixtures shared by the tests: a tiny phantom, a breakable copy of it, and the real frames if given."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from diffecho_utils import book, camus, data, phantom, profiles, results

REAL = Path(__file__).resolve().parents[2] / "shared" / "camus"
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))

threads = max(1, results.cores() // WORKERS)
torch.set_num_threads(threads)
if WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of what the tests start


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """With several workers each file stays on one of them, and so do those that need the whole book."""
    together = ("test_notebooks", "test_pages")
    for item in items:
        name = "book" if item.path.stem in together else item.path.stem
        item.add_marker(pytest.mark.xdist_group(name))
    first = (*together, "test_colab")  # the longest
    items.sort(key=lambda item: item.path.stem not in first)


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
    """Folder of the whole book, made at smoke size from the real frames, or the phantom where there are none."""
    root = REAL if REAL.is_dir() else None
    return book.build(root, "smoke", force=True).parent.parent


@pytest.fixture(scope="session")
def smoke():
    return profiles.get("smoke")


@pytest.fixture(scope="session")
def frames(phantom_root, smoke):
    """All frames of the phantom at the smoke profile's size."""
    return data.load_frames(camus.read_table(phantom_root), smoke.side)
