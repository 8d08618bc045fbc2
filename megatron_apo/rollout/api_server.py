"""vLLM's API server as this package starts it: `python -m megatron_apo.rollout.api_server ARGUMENTS`, vLLM's own.

Importing vLLM makes a million objects, which Python would search for garbage 1,500 times: a fifth of the import.
The engine's process, which vLLM spawns, imports this file in place of vLLM's server, and so does without what only the
server needs. (`vllm serve` looks up a distribution named `vllm`, which the CPU wheel is not.)
"""

from __future__ import annotations

import gc
import runpy

gc.set_threshold(50_000, 20, 20)

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
