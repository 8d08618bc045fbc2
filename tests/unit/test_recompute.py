"""Recomputation: the same gradients whatever is computed twice, and what layers do not have is refused."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_apo.config import ParallelConfig, RecipeError, RecomputeModule, TrainConfig, build_recipe
from megatron_apo.model.attention import SDPAttention
from megatron_apo.model.hf_config import ModelConfigError
from megatron_apo.model.layer_spec import block_spec
from megatron_apo.model.megatron_config import transformer_config
from megatron_apo.model.precision import Precision
from megatron_apo.model.recompute import check_recompute, recompute_modules
from megatron_apo.parallel.groups import alone
from tests.unit.test_precision import EXPERTS, SPEC

# Of two layers: how often the layers, their feed-forward parts (or the experts in them) and attention are computed, as
# multiples of a pass that keeps everything.
WAYS: list[tuple[dict[str, Any], tuple[float, float, float]]] = [
    ({"recompute": "selective"}, (1, 2, 1)),
    ({"recompute": "selective", "recompute_modules": ["core_attn"]}, (1, 1, 2)),
    ({"recompute": "selective", "recompute_modules": ["core_attn", "FEED_FORWARD"]}, (1, 2, 2)),
    ({"recompute": "full"}, (2, 2, 2)),
    ({"recompute": "full", "recompute_layers": 2}, (2, 2, 2)),
    ({"recompute": "full", "recompute_method": "block"}, (1.5, 1.5, 1.5)),
]


@pytest.mark.parametrize("spec", [SPEC, EXPERTS], ids=["dense", "experts"])
def test_recomputation_gives_the_same_gradients(spec):
    spec = replace(spec, num_layers=2)

    def backward(**settings: Any) -> tuple[dict[str, torch.Tensor], Counter[type]]:
        if "FEED_FORWARD" in settings.get("recompute_modules", ()):
            settings["recompute_modules"] = ["core_attn", "moe" if spec.num_experts else "mlp"]
        config = transformer_config(spec, ParallelConfig(), Precision(), TrainConfig(**settings))
        model = GPTModel(
            config=config,
            transformer_layer_spec=block_spec(spec, config, "local"),
            vocab_size=spec.vocab_size,
            max_sequence_length=spec.max_positions,
            position_embedding_type="rope",
        )
        torch.manual_seed(0)
        calls: Counter[type] = Counter()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        for module in model.modules():
            module.register_forward_pre_hook(lambda module, _: calls.update([type(module)]))
        tokens_BS = torch.randint(spec.vocab_size, (2, 9))
        model(tokens_BS, torch.arange(9).expand(2, 9), None, labels=tokens_BS.roll(-1, 1)).sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}, calls

    with alone():
        expected, once = backward()
        for settings, times in WAYS:
            found, calls = backward(**settings)
            for kind, share in zip((TransformerLayer, MLP, SDPAttention), times, strict=True):
                if spec.num_experts and kind is MLP and share == 1.5:
                    assert once[kind] < calls[kind] < 2 * once[kind]  # experts that have no token are not computed
                else:
                    assert calls[kind] == share * once[kind] > 0, (settings, kind)
            assert found.keys() == expected.keys()
            for name, gradient in found.items():
                assert gradient.any() and torch.equal(gradient, expected[name]), (settings, name)


def test_the_modules_are_megatrons_own():
    _, _, source = inspect.getsource(TransformerConfig.__post_init__).partition("if len(self.recompute_modules) > 0:")
    allowed = re.search(r"allowed_modules = \{(.*?)\}", source, re.DOTALL)[1]
    assert set(re.findall(r'"(\w+)"', allowed)) == set(get_args(RecomputeModule))


@pytest.mark.parametrize("layers", ["local", "te"])
@pytest.mark.parametrize("spec", [SPEC, EXPERTS], ids=["dense", "experts"])
def test_what_layers_do_not_have_is_refused(spec, layers):
    known = recompute_modules(spec, layers)
    assert ("moe_act" in known) == ("layernorm" in known) == (spec is EXPERTS and layers == "te")
    for module in get_args(RecomputeModule):
        train = TrainConfig(recompute="selective", recompute_modules=[module])
        if module in known:
            check_recompute(spec, ParallelConfig(), train, layers)
            transformer_config(spec, ParallelConfig(), Precision("bf16", layers=layers), train)
        else:
            line = rf"^train.recompute_modules: {module} is nothing that .*; use some of {', '.join(known)}$"
            with pytest.raises(ModelConfigError, match=line):
                check_recompute(spec, ParallelConfig(), train, layers)


@pytest.mark.parametrize(
    ("method", "layers", "fits"),
    [("uniform", 1, True), ("uniform", 2, True), ("uniform", 3, False), ("block", 3, True), ("block", 5, False)],
)
def test_a_chunk_has_the_layers_that_are_recomputed(method, layers, fits):
    """8 layers in two stages."""
    train = TrainConfig(recompute="full", recompute_method=method, recompute_layers=layers)
    if fits:
        check_recompute(SPEC, ParallelConfig(pp=2), train, "local")
        return
    with pytest.raises(ModelConfigError, match=rf"^train.recompute_layers: {layers} .* the 4 layers .*pp=2 x "):
        check_recompute(SPEC, ParallelConfig(pp=2), train, "local")


@pytest.mark.parametrize(
    ("recompute", "override", "kind"),
    [
        ("none", "recompute_modules=[mlp]", "selective"),
        ("full", "recompute_modules=[mlp]", "selective"),
        ("none", "recompute_layers=2", "full"),
        ("selective", "recompute_method=block", "full"),
    ],
)
def test_what_says_how_goes_with_its_kind(recompute, override, kind):
    named = ["model.path=m", "data.train=d", "vstar.dir=v", f"train.{override}"]
    build_recipe({}, [*named, f"train.recompute={kind}"])
    with pytest.raises(RecipeError, match=rf"^train.{override.split('=')[0]}: .* is for train.recompute={kind}, and"):
        build_recipe({}, [*named, f"train.recompute={recompute}"])
