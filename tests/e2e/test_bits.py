"""What a vLLM engine of any size holds after a sync from any layout is the checkpoint, bit for bit, and it computes
what transformers does with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_apo.config import RolloutConfig
from megatron_apo.rollout.server import VLLMServer
from megatron_apo.weights.hf_io import HFReader
from tests.dist.ranks import start_ranks
from tests.e2e.conftest import log_probs

MAX_MODEL_LEN = 96
VOCABULARY = 101  # not a multiple of any TP, nor of vLLM's padding
COMMON = {"vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
COMMON |= {"num_key_value_heads": 2, "intermediate_size": 192, "max_position_embeddings": 128}
COMMON |= {"eos_token_id": 1, "bos_token_id": None, "pad_token_id": None}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, int]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "qwen3_moe": (Qwen3MoeConfig, {"head_dim": 32} | EXPERTS),
}
SEQUENCES = [[2 + (11 * row + 5 * i * i) % (VOCABULARY - 2) for i in range(20 + row)] for row in range(4)]

Variant = tuple[str, bool, int, int]  # family, tied, the engine's TP and EP
DEFAULT: dict[Variant, str] = {
    ("qwen3", True, 1, 1): "tp2-pp2",
    ("qwen2", False, 2, 1): "pp2",
}
CASES = [
    pytest.param((family, tied, tp, ep), layout, marks=[] if is_default else pytest.mark.full)
    for family in FAMILIES
    for tied in (True, False)
    for tp, ep in ((1, 1), (2, 1), *([(2, 2)] if family == "qwen3_moe" else []))
    for layout in (("tp1", "pp2", "dp2-ep2") if family == "qwen3_moe" else ("tp1", "tp2", "pp2", "tp2-pp2"))
    for is_default in [DEFAULT.get((family, tied, tp, ep)) == layout]
]


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Variant], tuple[Path, VLLMServer]]]:
    """A variant's model, and an engine that was started with other weights: one at a time; cases come in order."""
    running: dict[Variant, tuple[Path, VLLMServer]] = {}

    def stop() -> None:
        for _, server in running.values():
            server.stop()
        running.clear()

    def start(variant: Variant) -> tuple[Path, VLLMServer]:
        if variant not in running:
            stop()
            family, tied, tp, ep = variant
            folder = tmp_path_factory.mktemp(f"{family}-{tp}")
            write_model(folder / "model", family, tied)
            apart = ["--enable-expert-parallel"] if ep > 1 else []  # vLLM's CPU experts hold, but compute wrongly
            rollout = RolloutConfig(tp=tp, kv_cache_gib=0.1, extra_args=apart)
            log = folder / "vllm.log"
            server = VLLMServer(
                rollout, folder / "model", log_path=log, seed=0, max_model_len=MAX_MODEL_LEN, load_format="dummy"
            )
            running[variant] = folder / "model", server
            server.start()
        return running[variant]

    yield start
    stop()


def write_model(folder: Path, family: str, tied: bool) -> None:
    """And what transformers computes with it."""
    kind, own = FAMILIES[family]
    torch.manual_seed(3)
    config = kind(**(COMMON | own), tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    model.eval().save_pretrained(folder)
    expected = [log_probs(model, sequence) for sequence in SEQUENCES]
    (folder / "log_probs.json").write_text(json.dumps([SEQUENCES, expected]))


@pytest.mark.parametrize(("variant", "layout"), CASES)
def test_an_engine_has_every_bit(
    variant: Variant, layout: str, engine_of: Callable[[Variant], tuple[Path, VLLMServer]], tmp_path: Path
) -> None:
    model, server = engine_of(variant)
    start_ranks(
        "tests.e2e.bits_worker",
        tmp_path,
        layout,
        str(model),
        server.url,
        server.token,
        "yes" if variant[3] == 1 else "no",
    )
    found = json.loads((tmp_path / "found.json").read_text())
    print(f"{variant} from {layout}: {found['worst']:.1e} nats")
    assert found["wrong"] == [] and found["tensors"] == len(HFReader(model).names())
    assert found["worst"] <= 1e-4
