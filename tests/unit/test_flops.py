"""A model's FLOPs: by hand, as torch counts them on a real model, and the rates that follow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from megatron_apo.model.flops import forward_flops, training_rates
from megatron_apo.model.hf_config import read_hf_config
from tests.models import make_model
from tests.specs import model_spec

DENSE = model_spec(
    family="llama",
    num_layers=3,
    hidden_size=8,
    ffn_size=16,
    num_heads=2,
    num_query_groups=1,
    head_dim=4,
    vocab_size=10,
)
MIXTURE = replace(DENSE, num_experts=4, experts_per_token=2, expert_ffn_size=6)

# One position of a layer: q 2*8*8, k and v 2*8*4 each, output 2*8*8.
PROJECTIONS = 128 + 64 + 64 + 128
# Prompt of 3 and response of 2: 4 positions, of which a causal mask leaves 10 pairs; scores and values, 2*8 each.
PAIRS = 10 * (16 + 16)
HEAD = 2 * (2 * 8 * 10)


def test_dense_by_hand() -> None:
    mlp = 3 * (2 * 8 * 16)  # gate, up, down
    assert forward_flops(DENSE, [(3, 2)]) == 3 * (4 * (PROJECTIONS + mlp) + PAIRS) + HEAD == 15_104
    assert forward_flops(DENSE, [(3, 2), (1, 1), (3, 2)]) == 2 * 15_104 + forward_flops(DENSE, [(1, 1)])


def test_mixture_counts_the_active_experts_and_the_router() -> None:
    mlp = 2 * 3 * (2 * 8 * 6) + 2 * 8 * 4
    assert forward_flops(MIXTURE, [(3, 2)]) == 3 * (4 * (PROJECTIONS + mlp) + PAIRS) + HEAD == 13_568


def test_a_real_model_does_what_is_counted(tmp_path: Path) -> None:
    """Transformers computes logits everywhere and all T x T scores, of which a causal mask leaves (T + 1) / 2T."""
    path, positions = make_model("qwen3", tmp_path), 12
    spec = read_hf_config(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    mm, bmm = torch.ops.aten.mm, torch.ops.aten.bmm
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.arange(positions)[None]).logits
        forward = dict(counter.get_flop_counts()["Global"])
        logits.sum().backward()
        both = counter.get_flop_counts()["Global"]
    assert set(forward) == {mm, bmm}
    assert forward_flops(spec, [(1, positions)]) == forward[mm] + forward[bmm] * (positions + 1) / (2 * positions)
    assert both == {mm: 3 * forward[mm], bmm: 3 * forward[bmm]}


def test_rates_of_a_step() -> None:
    seconds = {"reference": 0.5, "train": 2.0, "optimizer": 0.25, "step": 9.0}
    found = training_rates(
        DENSE, [(3, 2)] * 4, seconds, num_ranks=2, peak_flops=1e6, has_reference=True
    )  # forward: 4 x 15,104 = 60,416
    assert found == {
        "tokens_per_s/reference": 40,
        "tokens_per_s/forward_backward": 10,
        "tokens_per_s/train": pytest.approx(20 / 2.75),
        "tflops_per_rank/reference": pytest.approx(60_416e-12),
        "tflops_per_rank/forward_backward": pytest.approx(45_312e-12),
        "tflops_per_rank/train": pytest.approx(4 * 60_416e-12 / 2.75 / 2),
        "mfu/reference": pytest.approx(0.060416),
        "mfu/forward_backward": pytest.approx(0.045312),
        "mfu/train": pytest.approx(4 * 0.060416 / 2.75 / 2),
    }


def test_a_critic_is_trained_as_well() -> None:
    """Its head has one row in the place of 10: 2 x 8 x 9 x 2 less than the policy's forward, of 15,104."""
    seconds = {"reference": 0.5, "train": 2.0, "critic": 3.0, "old_policy": 0.25, "optimizer": 0.25}
    found = training_rates(
        DENSE, [(3, 2)], seconds, num_ranks=1, peak_flops=None, has_reference=True, critic=DENSE.as_critic()
    )
    flops = 4 * (15_104 - 288)  # values and, with gradients, their training
    assert found["tflops_per_rank/critic"] == pytest.approx(flops / 3.0 / 1e12)
    assert found["tflops_per_rank/train"] == pytest.approx((4 * 15_104 + flops) / 6.0 / 1e12)
    assert found["tokens_per_s/train"] == pytest.approx(5 / 6.0)


def test_no_rate_is_invented() -> None:
    seconds = {"reference": 0.0, "train": 2.0, "optimizer": 0.25}
    found = training_rates(DENSE, [(3, 2)], seconds, num_ranks=1, peak_flops=None, has_reference=False)
    assert {name.split("/")[0] for name in found} == {"tokens_per_s", "tflops_per_rank"}
    assert {name.split("/")[1] for name in found} == {"forward_backward", "train"}
    assert found["tflops_per_rank/train"] == pytest.approx(3 * 15_104e-12 / 2.25)
