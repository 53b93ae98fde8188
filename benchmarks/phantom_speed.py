"""How long the phantom takes to write: the default book's 60 patients, and as many as CAMUS has.

    python benchmarks/phantom_speed.py                    (5 minutes on two cores)

Both views, end-diastole and end-systole, 256 pixels in depth, files included.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import pandas as pd

from diffecho_utils import phantom, results


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--patients", type=int, nargs="*", default=[60, 500])
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--processes", type=int, nargs="*", default=sorted({1, cores}))
    options = parser.parse_args()
    rows = []
    for patients in options.patients:
        for processes in options.processes:
            rows.append(measure(patients, processes))
            print(pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1), flush=True)
    print(f"phantom version {phantom.VERSION}, {results.hardware()}")


def measure(patients, processes):
    """One row of the table; CPU seconds, of all processes, tell when others were using the cores."""
    with tempfile.TemporaryDirectory() as folder:
        started, cpu = time.perf_counter(), sum(os.times()[:4])
        root = phantom.write(Path(folder) / "phantom", patients, processes=processes)
        seconds, cpu = time.perf_counter() - started, sum(os.times()[:4]) - cpu
        size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    return {
        "patients": patients,
        "processes": processes,
        "seconds": round(seconds, 1),
        "CPU seconds": round(cpu, 1),
        "ms/frame": round(1000 * seconds / (4 * patients), 1),
        "MiB": round(size / 2**20, 1),
    }


if __name__ == "__main__":
    main()
