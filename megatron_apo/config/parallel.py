"""How the trainer's ranks share out a model and its batches."""

from __future__ import annotations

from pydantic import Field

from megatron_apo.config.base import MAY_CHANGE, Section
from megatron_apo.config.model import ModelConfig


class ParallelConfig(Section):
    tp: int = Field(1, ge=1, description="tensor-parallel ranks; divides the attention heads")
    pp: int = Field(1, ge=1, description="pipeline-parallel stages; divides the layers")
    vpp: int = Field(
        1, ge=1, description="model chunks of a pipeline rank (interleaved schedule); pp x vpp divides the layers"
    )
    cp: int = Field(1, ge=1, description="context-parallel ranks: each holds its part of every sequence")
    dp: int = Field(1, ge=1, description="data-parallel replicas")
    ep: int = Field(1, ge=1, description="expert-parallel ranks, a divisor of dp x cp; divides a mixture's experts")
    sequence_parallel: bool = Field(
        False, description="split what lies between tensor-parallel layers over their ranks; Transformer Engine only"
    )
    ranks_per_node: int | None = Field(
        None,
        ge=1,
        json_schema_extra=MAY_CHANGE,
        description="ranks of each node of a SLURM job; none: as many as it has GPUs, without GPUs all on one node",
    )
    threads_per_rank: int = Field(
        1, ge=1, description="CPU threads of each trainer rank; optimizer.cpu_offload updates by them"
    )
    timeout_s: float = Field(
        1800, gt=0, description="how long a collective may wait, or a rank be silent, until the run ends"
    )

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def micro_batch_group(self) -> int:
        """The number of micro-batches is a multiple of this: the interleaved schedule runs them in groups of pp."""
        return self.pp if self.vpp > 1 else 1

    @property
    def pieces_per_sequence(self) -> int:
        """Equal pieces that each sequence is cut into.

        A context-parallel rank holds two of each sequence, which tensor-parallel ranks share under sequence
        parallelism.
        """
        return (2 * self.cp if self.cp > 1 else 1) * (self.tp if self.sequence_parallel else 1)

    def problems(self, model: ModelConfig) -> list[str]:
        """Combinations that cannot work, one line each."""
        found = []
        if (self.dp * self.cp) % self.ep:
            found.append(
                f"parallel.ep: {self.ep} does not divide parallel.dp={self.dp} x parallel.cp={self.cp}, the replicas "
                f"that hold the experts together; make the product a multiple of {self.ep}"
            )
        if self.vpp > 1 and self.pp == 1:
            found.append(f"parallel.vpp: {self.vpp} chunks need a pipeline; set parallel.pp to 2 or more, or use 1")
        if self.sequence_parallel and self.tp == 1:
            found.append(
                "parallel.sequence_parallel: there is nothing to split with parallel.tp=1; use false, or a larger "
                "parallel.tp"
            )
        if self.sequence_parallel and (model.layers == "local" or model.dtype == "fp32"):
            found.append(
                "parallel.sequence_parallel: only Transformer Engine's layers have it, which are not chosen with "
                f"model.layers={model.layers} and model.dtype={model.dtype}; set these to auto and bf16, or use false"
            )
        return found
