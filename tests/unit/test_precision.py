"""Precision: what a recipe asks is chosen or refused by machine, and Megatron-Core is told the same."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.fp8_utils import get_fp8_align_size, is_first_last_bf16_layer
from megatron.core.optimizer import OptimizerConfig

from megatron_apo.config import FP8Config, ModelConfig, ParallelConfig, Recipe, RecipeError, TrainConfig
from megatron_apo.config import OptimizerConfig as OptimizerSection
from megatron_apo.model import precision
from megatron_apo.model.hf_config import ModelConfigError
from megatron_apo.model.megatron_config import transformer_config
from megatron_apo.model.precision import (
    APEX_EXTENSION,
    Precision,
    assign,
    check_precision,
    ddp_arguments,
    fp8_recipes,
    has_fused_gradients,
    layer_kind,
    load_error,
    optimizer_arguments,
    optimizer_problems,
    plain,
)
from tests.specs import model_spec

SPEC = model_spec(
    family="qwen3",
    num_layers=8,
    hidden_size=64,
    ffn_size=96,
    num_heads=4,
    num_query_groups=2,
    head_dim=16,
    vocab_size=32,
    qk_norm=True,
)
EXPERTS = replace(SPEC, family="qwen3_moe", num_experts=4, experts_per_token=2, expert_ffn_size=48)
HOPPER, BLACKWELL = (9, 0), (10, 0)
RECIPES = ("tensorwise", "blockwise", "mxfp8")


def model(**changes: Any) -> ModelConfig:
    return ModelConfig(path=Path("m"), **changes)


@pytest.fixture
def with_te(tmp_path, monkeypatch) -> None:
    """Transformer Engine can be imported here, though not used."""
    install_te(tmp_path, monkeypatch)


def install_te(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str = "") -> None:
    """A package of that name, whose torch extension is `code`."""
    (folder / "transformer_engine").mkdir()
    (folder / "transformer_engine" / "__init__.py").touch()
    (folder / "transformer_engine" / "pytorch.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(precision, "_import_error", precision._import_error.__wrapped__)


@pytest.fixture
def without_te(monkeypatch) -> None:
    monkeypatch.setattr("megatron_apo.model.precision.has_transformer_engine", lambda: False)


@pytest.mark.parametrize(
    ("changes", "capability", "kind"),
    [
        ({"dtype": "bf16"}, HOPPER, "te"),
        ({"dtype": "bf16", "layers": "te"}, HOPPER, "te"),
        ({"dtype": "bf16", "layers": "local"}, HOPPER, "local"),
        ({"dtype": "bf16", "fp8": {"recipe": "blockwise"}}, HOPPER, "te"),
        ({"dtype": "bf16"}, (8, 0), "te"),
        ({}, HOPPER, "local"),  # fp32: its fused attention is 16-bit
        ({"dtype": "bf16"}, None, "local"),
    ],
)
def test_layers_where_transformer_engine_is(with_te, changes, capability, kind):
    assert layer_kind(model(**changes), ParallelConfig(), capability) == kind


def test_log_ratios_may_differ_only_where_kernels_may():
    assert Precision("bf16", None, "local").log_ratio_tolerance == Precision().log_ratio_tolerance == 0
    bf16, fp8 = Precision("bf16", None, "te"), Precision("bf16", FP8Config(), "te")
    assert 0 < bf16.log_ratio_tolerance < fp8.log_ratio_tolerance < 1


def test_layers_where_transformer_engine_is_not(without_te):
    for capability in (None, HOPPER):
        for changes in ({}, {"dtype": "bf16"}, {"layers": "local"}):
            assert layer_kind(model(**changes), ParallelConfig(cp=2), capability) == "local"
    asked = model(dtype="bf16", layers="te", fp8=FP8Config())
    for capability, missing in ((None, "here is no GPU"), (HOPPER, "it is not installed here")):
        with pytest.raises(RecipeError) as error:
            layer_kind(asked, ParallelConfig(tp=2, sequence_parallel=True), capability)
        keys, fixes = ("model.layers", "model.fp8", "parallel.sequence_parallel"), ("local", "null", "false")
        for line, key, fix in zip(error.value.problems, keys, fixes, strict=True):
            assert line.startswith(f"{key}: ") and missing in line and line.endswith(fix)


def test_a_transformer_engine_that_does_not_load_is_none(tmp_path, monkeypatch):
    install_te(tmp_path, monkeypatch, "raise ImportError('undefined symbol: _ZN3c10')")
    assert layer_kind(model(dtype="bf16"), ParallelConfig(), HOPPER) == "local"
    with pytest.raises(RecipeError, match=r"importing it fails here \(ImportError: undefined symbol: _ZN3c10\)"):
        layer_kind(model(dtype="bf16", layers="te"), ParallelConfig(), HOPPER)


@pytest.mark.parametrize(
    ("capability", "recipes"),
    [
        ((8, 0), ()),
        ((8, 9), ("tensorwise",)),
        ((9, 0), ("tensorwise", "blockwise")),
        ((10, 0), RECIPES),
        ((10, 3), RECIPES),
        ((12, 0), ("tensorwise", "blockwise")),
    ],
)
def test_recipes_of_the_hardware(with_te, capability, recipes):
    """Those for which Transformer Engine 2's `check_fp8_support` and its like say yes."""
    assert tuple(fp8_recipes(capability)) == recipes
    for recipe in RECIPES:
        asked = model(dtype="bf16", fp8={"recipe": recipe})
        if recipe in recipes:
            assert layer_kind(asked, ParallelConfig(), capability) == "te"
        else:
            fix = " or ".join(recipes) or "model.fp8=null"
            with pytest.raises(RecipeError, match=rf"^model.fp8.recipe: {recipe} needs .*; use {fix}$"):
                layer_kind(asked, ParallelConfig(), capability)


@pytest.mark.parametrize(
    ("capability", "te", "missing"),
    [(None, True, "here is no GPU"), (HOPPER, False, "it is not installed here"), (HOPPER, True, None)],
)
def test_optimizers_of_the_machine(capability, te, missing, monkeypatch):
    monkeypatch.setattr("megatron_apo.model.precision.has_transformer_engine", lambda: te)
    assert optimizer_problems(OptimizerSection(), capability) == []
    found = optimizer_problems(OptimizerSection(cpu_offload=0.5, moments="bf16"), capability)
    assert len(found) == (2 if missing else 0)
    for line, (asked, usual) in zip(found, (("cpu_offload: 0.5", "0"), ("moments: bf16", "fp32")), strict=False):
        assert line.startswith(f"optimizer.{asked} needs Transformer Engine") and f"{missing}; use {usual}" in line


@pytest.mark.parametrize(
    ("version", "recipes"),
    [
        (None, RECIPES),
        ("2.1.0", ("mxfp8",)),
        ("2.2.1", ("tensorwise", "mxfp8")),
        ("2.3.0.dev0+5fdd7bb", RECIPES),
        ("2.13.0", RECIPES),
    ],
)
def test_what_an_old_transformer_engine_lacks(with_te, monkeypatch, version, recipes):
    """As Megatron-Core's `get_fp8_recipe` asks, and the bf16 moments of TE's own Adam."""

    def installed(distribution: str) -> str:
        if distribution != "transformer-engine" or version is None:
            raise metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(metadata, "version", installed)
    assert set(fp8_recipes(BLACKWELL)) == set(recipes)
    for recipe in RECIPES:
        asked = model(dtype="bf16", fp8={"recipe": recipe})
        if recipe in recipes:
            assert layer_kind(asked, ParallelConfig(), BLACKWELL) == "te"
        else:
            here = ".".join(version.split(".")[:2])
            line = rf"^model.fp8.recipe: {recipe} needs Transformer Engine 2.\d or later, and here is {here}; use "
            with pytest.raises(RecipeError, match=line + " or ".join(fp8_recipes(BLACKWELL))):
                layer_kind(asked, ParallelConfig(), BLACKWELL)
    found = optimizer_problems(OptimizerSection(moments="bf16"), HOPPER)
    assert len(found) == (version not in (None, "2.13.0"))
    assert all(line.startswith("optimizer.moments: bf16 needs Transformer Engine 2.13 or later, and") for line in found)


def test_an_apex_that_does_not_load_is_none(tmp_path, monkeypatch):
    """It needs torch to be loaded, as it is wherever it is used."""
    monkeypatch.setattr(precision, "_import_error", precision._import_error.__wrapped__)
    assert not has_fused_gradients() and load_error(APEX_EXTENSION) is None
    extension = tmp_path / f"{APEX_EXTENSION}.py"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    extension.write_text("import sys\nif 'torch' not in sys.modules: raise ImportError('libc10.so')")
    assert has_fused_gradients()
    extension.write_text("raise ImportError('undefined symbol: _ZN3c10')")
    assert not has_fused_gradients() and load_error(APEX_EXTENSION) == "ImportError: undefined symbol: _ZN3c10"


def alignments(recipe: str | None, tp: int, cp: int, sequence_parallel: bool, packing: bool = True) -> tuple[int, int]:
    """(a sequence's, a micro-batch's)"""
    made = Recipe.model_construct(
        model=model(dtype="bf16", fp8=recipe and FP8Config(recipe=recipe)),
        parallel=ParallelConfig(tp=tp, cp=cp, sequence_parallel=sequence_parallel),
        train=TrainConfig(packing=packing),
    )
    return made.alignment, made.micro_batch_alignment


@given(
    recipe=st.sampled_from([None, *RECIPES]),
    tp=st.integers(1, 8),
    cp=st.integers(1, 6),
    sequence_parallel=st.booleans(),
    packing=st.booleans(),
)
def test_alignment_serves_every_rank(recipe, tp, cp, sequence_parallel, packing):
    def can_be_cut(tokens: int) -> bool:
        share, rest = divmod(tokens, cp)  # of a context-parallel rank: two equal pieces
        if rest or (cp > 1 and share % 2):
            return False
        return not sequence_parallel or (share // (2 if cp > 1 else 1)) % tp == 0

    sequence, micro_batch = alignments(recipe, tp, cp, sequence_parallel, packing)
    least = next(n for n in range(1, 10**3) if can_be_cut(n))
    assert sequence == (least if packing or recipe is None else micro_batch)
    assert micro_batch % sequence == 0
    if recipe is None:
        assert micro_batch == sequence
        return
    share = micro_batch // cp
    assert share % get_fp8_align_size(recipe) == 0
    local = share // tp if sequence_parallel else share
    # Transformer Engine on what a rank has before it is gathered: `assert_dim_for_fp8_exec`, and each quantizer's
    # `is_quantizable`, by whole blocks.
    assert local % 8 == 0
    assert local % {"tensorwise": 1, "mxfp8": 32, "blockwise": 128 if sequence_parallel else 1}[recipe] == 0


@pytest.mark.parametrize(
    ("recipe", "tp", "cp", "sequence_parallel", "tokens"),
    [
        (None, 8, 1, False, (1, 1)),
        (None, 1, 4, False, (8, 8)),
        (None, 2, 2, True, (8, 8)),
        ("tensorwise", 8, 1, False, (1, 16)),
        ("tensorwise", 4, 2, True, (16, 128)),  # 16 tokens on each of the 8 ranks that share a micro-batch
        ("tensorwise", 1, 3, False, (6, 48)),
        ("mxfp8", 1, 2, False, (4, 64)),
        ("blockwise", 4, 1, True, (4, 512)),
    ],
)
def test_alignments(recipe, tp, cp, sequence_parallel, tokens):
    assert alignments(recipe, tp, cp, sequence_parallel) == tokens
    assert alignments(recipe, tp, cp, sequence_parallel, packing=False) == (tokens[1], tokens[1])


def test_fp32_and_bf16_in_megatrons_words():
    config = transformer_config(SPEC, ParallelConfig(), Precision())
    assert (config.params_dtype, config.bf16, config.fp8, config.fp8_param) == (torch.float32, False, None, False)
    config = transformer_config(SPEC, ParallelConfig(), Precision("bf16"))
    assert (config.params_dtype, config.pipeline_dtype, config.bf16) == (torch.bfloat16, torch.bfloat16, True)
    ddp = DistributedDataParallelConfig(**ddp_arguments(config))
    assert ddp.grad_reduce_in_fp32 and not ddp.fp8_param_gather
    optimizer = OptimizerConfig(**optimizer_arguments(config))
    assert (optimizer.bf16, optimizer.params_dtype, optimizer.main_params_dtype, optimizer.main_grads_dtype) == (
        True,
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    assert optimizer.fp8_recipe is None


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize(("recipe", "format"), [("tensorwise", "hybrid"), ("blockwise", "e4m3"), ("mxfp8", "e4m3")])
def test_fp8_in_megatrons_words(recipe, format, gather):
    """Megatron-Core's configurations take the arguments, by their own validation."""
    fp8 = FP8Config(recipe=recipe, param_gather=gather, bf16_last_layers=2)
    config = transformer_config(SPEC, ParallelConfig(), Precision("bf16", fp8, "te"))
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == (format, recipe, gather)
    bf16 = [layer for layer in range(SPEC.num_layers) if is_first_last_bf16_layer(config, layer)]
    assert bf16 == [6, 7]
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, **ddp_arguments(config))
    assert (ddp.fp8_param_gather, ddp.reuse_grad_buf_for_mxfp8_param_ag) == (gather, gather and recipe == "mxfp8")
    optimizer = OptimizerConfig(use_distributed_optimizer=True, **optimizer_arguments(config))
    assert optimizer.fp8_recipe == recipe
    assert optimizer.reuse_grad_buf_for_mxfp8_param_ag == ddp.reuse_grad_buf_for_mxfp8_param_ag


def test_layouts_in_megatrons_words():
    parallel = ParallelConfig(tp=2, pp=2, vpp=2, cp=2, dp=2, sequence_parallel=True)
    config = transformer_config(SPEC, parallel, Precision("bf16", layers="te"))
    assert (config.tensor_model_parallel_size, config.sequence_parallel, config.context_parallel_size) == (2, True, 2)
    assert (config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size) == (2, 2)
    alone_config = transformer_config(SPEC, ParallelConfig(), Precision())
    assert alone_config.virtual_pipeline_model_parallel_size is None  # 1 would be an interleaved schedule
    for layers, grouped in (("te", True), ("local", False)):
        config = transformer_config(EXPERTS, ParallelConfig(ep=2, dp=2), Precision("bf16", layers=layers))
        assert (config.moe_grouped_gemm, config.expert_model_parallel_size) == (grouped, 2)
    parallel = ParallelConfig(tp=2, ep=2, dp=2, sequence_parallel=True)
    config = transformer_config(EXPERTS, parallel, Precision("bf16", layers="te"))
    assert config.sequence_parallel and config.expert_tensor_parallel_size == 2  # as `EXPERT_ROWS` are split


def test_bf16_layers_of_a_stage_as_megatron_counts_them():
    parallel = ParallelConfig(pp=2)
    for name in ("bf16_first_layers", "bf16_last_layers"):
        fits, exceeds = FP8Config(**{name: 4}), FP8Config(**{name: 5})
        check_precision(SPEC, parallel, fits)
        transformer_config(SPEC, parallel, Precision("bf16", fits, "te"))
        with pytest.raises(ModelConfigError, match=rf"^model.fp8.{name}: 5 .*use at most 4$"):
            check_precision(SPEC, parallel, exceeds)
        with pytest.raises(ValueError, match="in_bf16"):
            transformer_config(SPEC, parallel, Precision("bf16", exceeds, "te"))


def test_shapes_that_fp8_cannot_multiply():
    check_precision(replace(SPEC, ffn_size=90), ParallelConfig(), None)
    tensorwise, mxfp8 = FP8Config(), FP8Config(recipe="mxfp8")
    check_precision(SPEC, ParallelConfig(tp=2), tensorwise)  # 64, 32, 64 and 48 a rank
    check_precision(EXPERTS, ParallelConfig(), tensorwise)
    with pytest.raises(
        ModelConfigError, match="^model.fp8: intermediate_size is 48 on a rank of parallel.tp=2, which 32"
    ):
        check_precision(SPEC, ParallelConfig(tp=2), mxfp8)
    with pytest.raises(ModelConfigError, match="^model.fp8: moe_intermediate_size is 48 .*which 32"):
        check_precision(EXPERTS, ParallelConfig(), mxfp8)
    with pytest.raises(ModelConfigError) as error:
        check_precision(replace(SPEC, hidden_size=40, head_dim=5, ffn_size=90), ParallelConfig(), tensorwise)
    assert len(str(error.value).splitlines()) == 4


def test_the_master_of_an_fp8_weight_starts_from_what_was_loaded():
    weight = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
    value = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assign(weight, value)
    assert torch.equal(plain(weight), value.bfloat16()) and weight.requires_grad
    kept = weight._high_precision_init_val = torch.full_like(weight.data, 7)  # as Transformer Engine attaches it
    assign(weight, value + 1)
    assert torch.equal(kept, (value + 1).bfloat16()) and torch.equal(weight.data, kept)
