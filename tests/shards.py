"""Parameters of one rank as Megatron would hold them, without Megatron, process groups or other ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from megatron_apo.model.hf_config import ModelSpec
from megatron_apo.runtime.topology import Topology
from megatron_apo.weights.parameters import stage_entries
from tests.specs import model_spec

# config.json of the public model.
QWEN3_30B_A3B = model_spec(
    family="qwen3_moe",
    num_layers=48,
    hidden_size=2048,
    ffn_size=0,
    num_heads=32,
    num_query_groups=4,
    head_dim=128,
    vocab_size=151936,
    num_experts=128,
    experts_per_token=8,
    expert_ffn_size=768,
    qk_norm=True,
)


class Chunk(torch.nn.Module):
    """A model chunk of which there are the parameters alone."""

    def __init__(self, parameters: Iterable[tuple[str, Tensor]]):
        super().__init__()
        self._named = {name: torch.nn.Parameter(value, requires_grad=False) for name, value in parameters}

    def named_parameters(self, *arguments: object, **options: object) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return iter(self._named.items())


def topologies(*, device: str = "cpu", **sizes: int) -> Iterator[Topology]:
    """Each rank's place in a layout (tp, pp, dp, ep, cp, vpp), without groups."""
    size = Counter(sizes)
    tp, pp, dp, cp = (size[name] or 1 for name in ("tp", "pp", "dp", "cp"))
    for rank in range(tp * pp * dp * cp):
        rest, tp_rank = divmod(rank, tp)
        rest, cp_rank = divmod(rest, cp)
        pp_rank, dp_rank = divmod(rest, dp)
        yield Topology(
            rank=rank,
            world_size=tp * pp * dp * cp,
            tp_rank=tp_rank,
            pp_rank=pp_rank,
            dp_rank=dp_rank,
            tp=tp,
            pp=pp,
            dp=dp,
            tp_group=None,
            pp_group=None,
            dp_group=None,
            device=torch.device(device),
            ep=size["ep"] or 1,
            cp=cp,
            cp_rank=cp_rank,
            vpp=size["vpp"] or 1,
        )


def chunks_of(spec: ModelSpec, topology: Topology, tensors: Mapping[str, Tensor]) -> list[Chunk]:
    """The rank's model chunks with its shards of `tensors`, as the rules split them."""
    named: list[list[tuple[str, Tensor]]] = [[] for _ in range(topology.vpp)]
    for entry in stage_entries(spec, topology):
        full = [tensors[name] for name in entry.hf]
        named[entry.chunk].append((entry.megatron, entry.rule.split(full, spec, topology.tp)[topology.tp_rank]))
    return [Chunk(parameters) for parameters in named]
