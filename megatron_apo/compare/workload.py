"""A fixed piece of work, whose time says how fast the machine is now: `python -m megatron_apo.compare.workload`

Matrix products and a loop of Python's, in one process for each core that this process may use, all at once. What is
timed begins when they have been imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from statistics import fmean

import numpy as np

from megatron_apo.runtime import guard
from megatron_apo.runtime.signals import put_off

_SIZE, _PRODUCTS, _ROUNDS = 512, 200, 20_000_000
_ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}


def reference_s() -> float:
    """Seconds that a process takes for the work, the mean of all."""
    command = [sys.executable, "-m", "megatron_apo.compare.workload"]
    processes: list[subprocess.Popen[str]] = []
    try:
        for _ in os.sched_getaffinity(0):
            with put_off():
                processes.append(
                    subprocess.Popen(
                        command,
                        env=os.environ | _ONE_THREAD,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        text=True,
                        start_new_session=True,
                        preexec_fn=partial(guard.end_with, os.getpid()),
                    )
                )
        return fmean(float(process.communicate()[0]) for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def work() -> float:
    """Do it once; seconds that it took."""
    start = time.perf_counter()
    factor = np.random.default_rng(0).standard_normal((_SIZE, _SIZE)) / _SIZE
    product = factor
    for _ in range(_PRODUCTS):
        product = product @ factor
    total = 0
    for number in range(_ROUNDS):
        total += number & 7
    return time.perf_counter() - start


if __name__ == "__main__":
    print(work())
