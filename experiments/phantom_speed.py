"""How long the phantom takes to write: the default book's 60 patients, and as many as CAMUS has.

Both views, end-diastole and end-systole, 256 pixels in depth, files included. 5 minutes on two cores.
"""

import os
import tempfile
import time
from pathlib import Path

import pandas as pd

from diffecho_utils import phantom, results

WORLD, SEEDS, SPLIT = "phantom", [], None
CORES = sorted({1, results.cores()})


def rows(world, patients=(60, 500), cores=tuple(CORES)):
    machine = {"machine": results.hardware(), "version": phantom.VERSION}
    pairs = [{"patients": n, "processes": k} for n in patients for k in cores]
    return {"{patients} patients, {processes} processes".format(**p): p | machine for p in pairs}


def compute(world, patients, processes, **_):
    """One row of the table; CPU seconds, of all processes, tell when others were using the cores."""
    with tempfile.TemporaryDirectory() as folder:
        started, cpu = time.perf_counter(), sum(os.times()[:4])
        root = phantom.write(Path(folder) / "phantom", patients, processes=processes)
        taken, cpu = time.perf_counter() - started, sum(os.times()[:4]) - cpu
        size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    found = {"wall seconds": taken, "CPU seconds": cpu, "ms/frame": 1000 * taken / (4 * patients)}
    return {"patients": patients, "processes": processes} | found | {"MiB": size / 2**20}


def collect(world, found):
    print(pd.DataFrame(found.values()).round(1).to_string(index=False))
    print(f"phantom version {phantom.VERSION}, {results.hardware()}")
    return {}
