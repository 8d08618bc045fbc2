"""Does a recipe fit this machine, and do the models that it names fit the recipe? Light, and starts nothing."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import psutil

from megatron_apo.config import Recipe, RecipeError, RolloutConfig
from megatron_apo.model.gpus import Capability, gpu_memory_bytes
from megatron_apo.model.hf_config import ModelSpec, check_layout, check_served, read_hf_config
from megatron_apo.model.precision import Layers, check_precision, layer_kind, optimizer_problems
from megatron_apo.model.recompute import check_recompute
from megatron_apo.parallel.launch import is_rank
from megatron_apo.rollout.server import engine_problems, served_length
from megatron_apo.telemetry.units import data_size
from megatron_apo.telemetry.weights_and_biases import wandb_problems

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp32": 4, "bf16": 2}  # of a number, as recipes name its type


def misfits(recipe: Recipe, models: Mapping[str, Path], gpus: Sequence[Capability]) -> list[str]:
    """What keeps a valid recipe from running on these GPUs (none: on the CPU), one line each.

    models: key of the recipe -> the Hugging Face folder there, of which only config.json is read.
    """
    parallel, found = recipe.parallel, []
    capability = min(gpus, default=None)
    layers: Layers = "local"
    try:
        layers = layer_kind(recipe.model, parallel, capability)
    except RecipeError as error:
        found += error.problems
    found += optimizer_problems(recipe.optimizer, capability)
    if gpus and parallel.world_size > len(gpus) and not is_rank():  # a rank of several machines sees its own alone
        found.append(
            f"parallel.dp: tp={parallel.tp} x pp={parallel.pp} x cp={parallel.cp} x dp={parallel.dp} is "
            f"{parallel.world_size} ranks, and here are {len(gpus)} GPUs; use a smaller layout, or start the ranks on "
            "several machines with torchrun"
        )
    if recipe.train.replay is None:
        found += engine_misfits(recipe, models, gpus)
    checks = (
        lambda spec, _: check_layout(spec, parallel),
        lambda spec, _: check_precision(spec, parallel, recipe.model.fp8),
        lambda spec, _: check_recompute(spec, parallel, recipe.train, layers),
        lambda spec, _: _check_host_memory(spec, recipe, len(gpus)),
    )
    return found + _of_models(models, checks, known=found) + wandb_problems(recipe.telemetry.wandb)


def engine_misfits(recipe: Recipe, models: Mapping[str, Path], gpus: Sequence[Capability]) -> list[str]:
    """`misfits` of vLLM alone, which is all that stage 1 starts."""
    rollout = recipe.rollout
    found = engine_problems(rollout)
    if gpus and rollout.tp > len(gpus):
        found.append(
            f"rollout.tp: {rollout.tp} workers, and here are {len(gpus)} GPUs; use at most as many, or name "
            "more in CUDA_VISIBLE_DEVICES"
        )
    checks = (
        lambda spec, _: check_served(spec),
        lambda spec, _: _check_engine(spec, rollout.tp),
        lambda spec, _: _check_engine_memory(spec, rollout, gpu_memory_bytes() if gpus else []),
        lambda _, folder: served_length(rollout, folder, recipe.max_sequence_tokens),
    )
    return found + _of_models(models, checks, known=found)


def refusals(checks: Iterable[Callable[[], object]], known: Sequence[str] = ()) -> list[str]:
    """What the checks raise `ValueError` for, one line each, without what is within a line of `known` or before."""
    found: list[str] = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            lines = str(error).splitlines()
            found += [line for line in lines if not any(line in other for other in (*known, *found))]
    return found


def _of_models(
    models: Mapping[str, Path], checks: Sequence[Callable[[ModelSpec, Path], object]], known: Sequence[str]
) -> list[str]:
    """What the checks refuse of each model that can be read, or why it cannot, with the key that names it."""
    found: list[str] = []
    for key, folder in models.items():

        def check_all(folder: Path = folder) -> None:
            spec = read_hf_config(folder)
            if lines := refusals(partial(check, spec, folder) for check in checks):
                raise ValueError("\n".join(lines))

        found += [f"{line} ({key})" for line in refusals([check_all], known=[*known, *found])]
    return found


def _check_engine(spec: ModelSpec, tp: int) -> None:
    """By vLLM's own conditions (config/model.py, and the attention of each family in model_executor/models)."""
    if spec.num_heads % tp:
        raise ValueError(f"rollout.tp: {tp} does not divide the model's {spec.num_heads} heads; use a divisor")
    groups = spec.num_query_groups
    if groups % tp and tp % groups:
        fits = [size for size in range(1, spec.num_heads + 1) if _tp_fits(spec, size)]
        raise ValueError(f"rollout.tp: {tp} and the model's {groups} KV heads do not divide; use one of {fits}")


def _tp_fits(spec: ModelSpec, tp: int) -> bool:
    return not spec.num_heads % tp and not (spec.num_query_groups % tp and tp % spec.num_query_groups)


def _check_engine_memory(spec: ModelSpec, rollout: RolloutConfig, gpus: Sequence[int]) -> None:
    """Weights and KV cache alone are held against a GPU; what else vLLM and the trainer need is not known before."""
    if not gpus:
        return
    room = min(gpus[: rollout.tp])
    weights = spec.num_weights * (1 if rollout.quantization else _BYTES[rollout.dtype]) // rollout.tp
    if weights + rollout.kv_cache_gib * 2**30 > room:
        most = math.floor((room - weights) / 2**30 * 100) / 100
        raise ValueError(
            f"rollout.kv_cache_gib: {rollout.kv_cache_gib:g} beside {data_size(weights)} of weights does not fit a GPU "
            f"of {data_size(room)}; use {f'less than {most:g}, or ' if most > 0 else ''}a larger rollout.tp"
        )


def _check_host_memory(spec: ModelSpec, recipe: Recipe, num_gpus: int) -> None:
    """What leaves this machine's GPUs has to go somewhere; on a CPU nothing leaves."""
    if not num_gpus:
        return
    model, parallel, optimizer = recipe.model, recipe.parallel, recipe.optimizer
    replicas = parallel.dp * parallel.cp
    held = (spec.num_weights - spec.num_expert_weights) * replicas + spec.num_expert_weights * replicas // parallel.ep
    # torchrun says how many of the ranks are here; there may be others on this machine that see other GPUs.
    here = int(os.environ.get("LOCAL_WORLD_SIZE", min(parallel.world_size, num_gpus))) / parallel.world_size
    needs = {}
    if recipe.train.offload_while_sampling:
        each = (2 * _BYTES[optimizer.moments] + (4 if model.dtype == "bf16" else 0)) * (1 - optimizer.cpu_offload)
        state = spec.num_weights if optimizer.distributed else held
        needs["train.offload_while_sampling: true"] = state * each * here
    if model.reference_mode != "resident":  # in swap the policy's weights wait as well
        copies = 2 if model.reference_mode == "swap" else 1
        needs[f"model.reference_mode: {model.reference_mode}"] = copies * held * _BYTES[model.dtype] * here
    if recipe.rollout.sleep_while_training and recipe.train.replay is None:
        needs["rollout.sleep_while_training: true"] = spec.num_weights * _BYTES[recipe.rollout.dtype]
    available = psutil.virtual_memory().available
    if sum(needs.values()) > available:
        parts = ", ".join(f"{setting} ({data_size(size)})" for setting, size in needs.items())
        raise ValueError(
            f"{parts} would wait in this machine's memory, of which {data_size(available)} are available; leave one "
            "out, or use a machine with more"
        )
