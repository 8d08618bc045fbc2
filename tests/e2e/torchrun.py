"""One job under torchrun: two agents, as two nodes have them, here on one host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_apo.runtime.ports import free_port
from tests.e2e.command import Command


def start_agents(
    command: Callable[..., Command], logs: Path, *arguments: str, module: str = "megatron_apo.cli", **environment: str
) -> Sequence[Command]:
    """Two agents with one rank each of `python -m MODULE ARGUMENTS`. logs: torchrun's own, which it leaves in TMPDIR
    when a rank fails."""
    port = free_port("127.0.0.1")
    return [
        command(
            *("--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1", "--master-addr=127.0.0.1"),
            *(f"--master-port={port}", f"--log-dir={logs / str(node)}", "-m", module, *arguments),
            program=("-m", "torch.distributed.run"),
            **environment,
        )
        for node in range(2)
    ]
