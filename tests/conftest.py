"""Fixtures shared by the tests: a tiny phantom, a breakable copy of it, and the real frames if given."""

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from filelock import FileLock

from diffecho_utils import assets, camus, data, phantom, profiles, results, synthetic, training

REAL = Path(__file__).resolve().parents[2] / "shared" / "camus"
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))

threads = int(os.environ.get("OMP_NUM_THREADS", max(1, results.cores() // WORKERS)))
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
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
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


def array(path):
    """The numbers in a NIfTI file, as they are stored."""
    return np.asanyarray(nib.load(path).dataobj)


def pictures(root):
    """{(patient, view, phase): (image, mask)} of a folder in the official layout."""
    rows = camus.read_table(root).itertuples()
    return {(row.patient, row.view, row.phase): camus.read_frame(row) for row in rows}


def assert_same_pictures(root, expected, tolerance=0.0):
    found = pictures(root)
    assert found.keys() == expected.keys()
    for key, (image, mask) in expected.items():
        assert found[key][0].dtype == np.float32 and found[key][1].dtype == np.uint8
        np.testing.assert_allclose(found[key][0], image, atol=tolerance, err_msg=str(key))
        np.testing.assert_array_equal(found[key][1], mask, err_msg=str(key))


@pytest.fixture(scope="session")
def filmed_root(tmp_path_factory):
    """A phantom of four patients with short half sequences, which nothing reads."""
    root = tmp_path_factory.mktemp("data") / "filmed"
    phantom.write(root, patients=4, seed=3, side=64, processes=1)
    for path in root.rglob("*_ED.nii.gz"):
        image = nib.load(path)
        film = np.stack([np.roll(array(path), shift) for shift in range(3)], -1)
        path = path.with_name(path.name.replace("ED", "half_sequence"))
        nib.Nifti1Image(film, image.affine).to_filename(path)
    return root


@pytest.fixture(scope="session")
def phantom_root(tmp_path_factory):
    """A phantom of ten patients."""
    return phantom.write(tmp_path_factory.mktemp("data") / "phantom", patients=10, seed=7)


@pytest.fixture
def broken_root(phantom_root, tmp_path):
    """A copy of the phantom that a test may damage."""
    return Path(shutil.copytree(phantom_root, tmp_path / "broken"))


@pytest.fixture
def parted_root(broken_root):
    """Such a copy with six patients for training, four for validation and none for testing."""
    shutil.rmtree(broken_root / "database_split")
    splits = ["training"] * 6 + ["validation"] * 4
    camus.write_lists(broken_root, {f"patient{i:04d}": its for i, its in enumerate(splits, 1)})
    return broken_root


@pytest.fixture(scope="session")
def real_root():
    """The real CAMUS frames beside the checkout; tests that need them skip where they are not."""
    if not REAL.is_dir():
        pytest.skip("real CAMUS frames are not at ../shared/camus")
    return REAL


@pytest.fixture(scope="session")
def built():
    """Folder of the whole book, made once at smoke size from the real frames, or the phantom without them."""
    import build  # the book's tools need more packages than the package does

    note = assets.workspace() / "built-by-tests"  # which run of the tests, and where
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", "")
    with FileLock(note.with_suffix(".lock")):
        if run and note.exists() and note.read_text().startswith(run):
            return Path(note.read_text().removeprefix(run))  # by another worker
        root = REAL if REAL.is_dir() else None
        folder = build.build(root, "smoke", force=True).parent.parent
        note.write_text(f"{run}{folder}")
    return folder


TRIAL = "import pytest\nwith pytest.raises((AssertionError, NotImplementedError), match='.{20}'):\n"


@pytest.fixture(scope="session")
def trial():
    """Makes of a chapter the teacher's copy in which every check is first tried on the stub and has to fail."""
    import course
    from nbformat.v4 import new_code_cell

    def trial(notebook):
        copy, cells = course.teacher(notebook), []
        stubs = {cell.id: cell.source for cell in course.student(notebook).cells}
        checks = (cell.source for cell in copy.cells if "check" in cell.metadata.get("tags", []))
        for cell in copy.cells:
            if "solution" in cell.metadata.get("tags", []) and cell.id in stubs:
                attempt = TRIAL + textwrap.indent(next(checks), "    ")
                cells += [new_code_cell(stubs[cell.id]), new_code_cell(attempt)]
            cells.append(cell)
        copy.cells = cells
        return copy

    return trial


@pytest.fixture(scope="session")
def smoke():
    return profiles.get("smoke")


@pytest.fixture(scope="session")
def frames(phantom_root, smoke):
    """All frames of the phantom at the smoke profile's size."""
    return data.load_frames(camus.read_table(phantom_root), smoke)


@pytest.fixture(scope="session")
def trained(smoke, frames, tmp_path_factory):
    """Every model, trained for a moment on the phantom: {model: folder}."""
    root = tmp_path_factory.mktemp("trained")
    folders = {model: root / model for model in training.MODELS}
    for model, needs in training.MODELS.items():
        built_on = {name: folders[name] for name in needs}
        training.train(model, frames, smoke, folders[model], needs=built_on, say=str)
    return folders


@pytest.fixture(scope="session")
def as_set(frames):
    """`as_set(folder, rows)`: these frames of the phantom as `sample` would have drawn them; the folder."""

    def write(folder, rows):
        for name in ("images", "label_maps"):
            (folder / name).mkdir(parents=True)
        for i, row in enumerate(rows):
            synthetic.save_image(frames.images[row], folder / f"images/{i}.png")
            synthetic.save_grey(frames.masks[row].numpy(), folder / f"label_maps/{i}.png")
        table = frames.table.loc[rows, ["view", "phase"]].assign(prompt="", seed=range(len(rows)))
        table["file_name"] = [f"images/{i}.png" for i in range(len(rows))]
        table["label_map"] = [f"label_maps/{i}.png" for i in range(len(rows))]
        table[synthetic.METADATA].to_csv(folder / "metadata.csv", index=False)
        (folder / "dataset.json").write_text(json.dumps({"settings": {"model": "sdm"}}))
        return folder

    return write
