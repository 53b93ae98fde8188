"""Fixtures shared by the tests: a tiny phantom, a breakable copy of it, and the real frames if given."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from diffecho_utils import camus, data, phantom, profiles

torch.set_num_threads(max(1, len(os.sched_getaffinity(0))))


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
    root = Path(__file__).resolve().parents[2] / "shared" / "camus"
    if not root.is_dir():
        pytest.skip("real CAMUS frames are not at ../shared/camus")
    return root


@pytest.fixture(scope="session")
def smoke():
    return profiles.get("smoke")


@pytest.fixture(scope="session")
def frames(phantom_root, smoke):
    """All frames of the phantom at the smoke profile's size."""
    return data.load_frames(camus.read_table(phantom_root), smoke.side)
