"""vLLM's API server as this package starts it: `python -m megatron_apo.rollout.api_server ARGUMENTS`, vLLM's own.

Importing vLLM makes a million objects, which Python would search for garbage 1,500 times: a fifth of the import.
The engine's process, which vLLM spawns, imports this file in place of vLLM's server, and so does without what only the
server needs. (`vllm serve` looks up a distribution named `vllm`, which the CPU wheel is not.)

An engine of one worker on a CPU is forked instead, and imports nothing again: a quarter less CPU time to start.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import runpy
import signal

gc.set_threshold(50_000, 20, 20)


def fork_engine() -> None:
    """vLLM spawns on a CPU since its workers' threads are bound by variables that are read when a process starts
    (platforms/cpu.py, `check_and_update_config`). Here they are there already (`server.py`, `_cpu_environment`)."""
    from vllm.platforms import current_platform
    from vllm.v1.engine import utils

    if current_platform.is_cpu():
        utils.get_mp_context = lambda: multiprocessing.get_context("fork")
        os.register_at_fork(after_in_child=_leave_loop)


def _leave_loop() -> None:
    """The server starts the engine from its event loop, which would hear of the engine's signals."""
    signal.set_wakeup_fd(-1)
    asyncio._set_running_loop(None)


if __name__ == "__main__":
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        fork_engine()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
