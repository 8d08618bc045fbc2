"""A layer's experts in one tensor, as transformers 5 holds them, and saves them with `save_original_format=False`.

    model.layers.N.mlp.experts.gate_up_proj     [E, 2 F, H]: an expert's gate, then its up
    model.layers.N.mlp.experts.down_proj        [E, H, F]

(modeling_qwen3_moe.py, `Qwen3MoeExperts`; conversion_mapping.py, "qwen2_moe".) vLLM 0.32 computes the
same of either. The transposed layout of Qwen3-VL is no qwen3_moe's, and its shapes are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_apo.model.hf_config import ModelSpec

_EXPERT = re.compile(r"(model\.layers\.[0-9]+\.mlp\.experts\.)([0-9]+)\.(gate|up|down)_proj\.weight")
_PART = {"gate": ("gate_up_proj", 0, 2), "up": ("gate_up_proj", 1, 2), "down": ("down_proj", 0, 1)}


@dataclass(frozen=True)
class ExpertSlice:
    """Where one expert's tensor lies: in the tensor `fused`, part `part` of `parts` of the expert's rows."""

    fused: str
    expert: int
    part: int
    parts: int

    def shape(self, fused: tuple[int, ...]) -> tuple[int, ...]:
        """Of the expert's tensor, where the fused one has this shape."""
        return (fused[1] // self.parts, *fused[2:])

    def rows(self, fused: tuple[int, ...]) -> tuple[int, slice]:
        """Index of the fused tensor that gives the expert's."""
        size = fused[1] // self.parts
        return self.expert, slice(self.part * size, (self.part + 1) * size)


def expert_slice(name: str) -> ExpertSlice | None:
    """Of an expert's own tensor by name; None for any other."""
    if match := _EXPERT.fullmatch(name):
        fused, part, parts = _PART[match[3]]
        return ExpertSlice(match[1] + fused, int(match[2]), part, parts)
    return None


def fused_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The fused tensors that a folder of this model may hold; none of a dense model."""
    experts, width, hidden = spec.num_experts, spec.expert_ffn_size, spec.hidden_size
    shapes = {"gate_up_proj": (experts, 2 * width, hidden), "down_proj": (experts, hidden, width)}
    return {
        f"model.layers.{layer}.mlp.experts.{name}": shape
        for layer in range(spec.num_layers if experts else 0)
        for name, shape in shapes.items()
    }
