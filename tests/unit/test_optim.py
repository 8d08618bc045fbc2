"""The recipe's optimizer in Megatron-Core's words, as far as they can be said without a GPU."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import optimizer_config

from megatron_apo.config import OptimizerConfig, ParallelConfig, RecipeError
from megatron_apo.learner import optimizer_state
from megatron_apo.learner.optim import _adam_arguments, make_trainable
from megatron_apo.learner.optimizer_state import RESHARDABLE
from megatron_apo.model.build import build_model
from megatron_apo.parallel.groups import alone
from megatron_apo.weights import torch_dist
from megatron_apo.weights.torch_dist import LAYOUT
from tests.unit.test_precision import SPEC

MODEL = SimpleNamespace(bf16=True, params_dtype=torch.bfloat16, fp8=None, fp8_recipe="delayed", fp8_param=False)


def test_the_offloaded_optimizer_keeps_its_main_weights_on_the_cpu(monkeypatch):
    """Megatron-Core 0.16 does so on its precision-aware path alone, and says itself when it takes that."""
    monkeypatch.setattr(optimizer_config, "is_te_min_version", lambda version: True)  # it asks, whatever is installed
    config = MegatronOptimizerConfig(**_adam_arguments(OptimizerConfig(cpu_offload=0.75), MODEL))
    assert config.optimizer_cpu_offload and config.optimizer_offload_fraction == 0.75
    assert config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 and config.exp_avg_dtype == torch.float32
    usual = MegatronOptimizerConfig(**_adam_arguments(OptimizerConfig(), MODEL))
    assert not usual.optimizer_cpu_offload and not usual.use_precision_aware_optimizer
    assert usual.bf16 and usual.params_dtype == torch.bfloat16 and usual.use_distributed_optimizer


def test_moments_in_bf16_leave_main_weights_and_gradients_in_fp32():
    arguments = _adam_arguments(OptimizerConfig(moments="bf16"), MODEL)
    assert arguments.keys() <= {field.name for field in fields(MegatronOptimizerConfig)}
    assert arguments["use_precision_aware_optimizer"] and not arguments["optimizer_cpu_offload"]
    assert arguments["exp_avg_dtype"] == arguments["exp_avg_sq_dtype"] == torch.bfloat16
    assert arguments["store_param_remainders"] is False  # 16 bits of them, which a checkpoint takes for all
    assert not arguments.keys() & {"main_params_dtype", "main_grads_dtype"}
    assert MegatronOptimizerConfig.main_params_dtype == MegatronOptimizerConfig.main_grads_dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU refuses")
def test_a_model_is_not_wrapped_for_an_optimizer_that_cannot_be():
    for config in (OptimizerConfig(cpu_offload=1.0), OptimizerConfig(moments="bf16")):
        with pytest.raises(RecipeError, match="optimizer.(cpu_offload: 1.0|moments: bf16)"):
            make_trainable([torch.nn.Linear(1, 1)], config, total_steps=1)


def test_what_checkpoints_are_described_by_stays_as_it_is():
    """Megatron-Core keeps a process group in it (transformer/utils.py, `ensure_metadata_has_dp_cp_group`)."""
    with alone() as topology:
        trainable = make_trainable(build_model(SPEC, ParallelConfig(), topology), OptimizerConfig(), total_steps=1)
        trainable.sharded_state(is_loading=True)
        trainable.sharded_state()
    assert LAYOUT == {"singleton_local_shards": True}
    assert RESHARDABLE.keys() - LAYOUT.keys() == {
        "distrib_optim_sharding_type",
        "distrib_optim_fully_reshardable_mem_efficient",
    }


def test_an_optimizer_that_is_not_in_a_checkpoint_is_refused_by_tensor(tmp_path):
    folder, name = tmp_path / "checkpoint", "decoder.final_layernorm.weight"
    with alone() as topology:
        trainable = make_trainable(build_model(SPEC, ParallelConfig(), topology), OptimizerConfig(), total_steps=1)
        trainable.sharded_state(is_loading=True)  # which allocates it
        torch_dist.write(folder, topology, trainable.sharded_state(), lambda path: None)

        def error(**changes: Any) -> str:
            """Of loading where the last norm is described otherwise."""
            state = torch_dist.read(folder, trainable.sharded_state(is_loading=True))
            model = trainable._sharded_model()
            for key, value in changes.items():
                setattr(model[0][name], key, value)
            with pytest.raises(torch_dist.CheckpointError) as caught:
                optimizer_state.load(trainable.optimizer, state["optimizer"], model, folder)
            return str(caught.value)

        unread = f"{folder}: the checkpoint could not be read: optimizer.state.param"
        assert error(key="elsewhere") == f"{unread}.elsewhere is missing"
        assert error(global_shape=(65,)) == f"{unread}.{name} has shape [64], expected [65]"
        (data,) = folder.glob("*.distcp")
        whole = data.read_bytes()
        state = torch_dist.read(folder, trainable.sharded_state(is_loading=True))
        data.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(torch_dist.CheckpointError, match=rf"{unread}\.[\w.]+: ") as caught:
            optimizer_state.load(trainable.optimizer, state["optimizer"], trainable._sharded_model(), folder)
        assert "\n" not in str(caught.value)
