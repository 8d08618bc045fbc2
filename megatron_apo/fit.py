"""Does a recipe fit this machine, and do the models that it names fit the recipe? Light, and starts nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from megatron_apo.config import Recipe, RecipeError
from megatron_apo.model.gpus import Capability
from megatron_apo.model.hf_config import ModelSpec, check_layout, check_served, read_hf_config
from megatron_apo.model.precision import check_precision, layer_kind, optimizer_problems
from megatron_apo.parallel.launch import is_rank
from megatron_apo.rollout.server import engine_problems, served_length
from megatron_apo.telemetry.metrics import wandb_problems


def misfits(recipe: Recipe, models: Mapping[str, Path], gpus: Sequence[Capability]) -> list[str]:
    """What keeps a valid recipe from running on these GPUs (none: on the CPU), one line each.

    models: key of the recipe -> the Hugging Face folder there, of which only config.json is read.
    """
    parallel, found = recipe.parallel, []
    capability = min(gpus, default=None)
    try:
        layer_kind(recipe.model, parallel, capability)
    except RecipeError as error:
        found += error.problems
    found += optimizer_problems(recipe.optimizer, capability)
    if gpus and parallel.world_size > len(gpus) and not is_rank():  # a rank of several machines sees its own alone
        found.append(
            f"parallel.dp: tp={parallel.tp} x pp={parallel.pp} x cp={parallel.cp} x dp={parallel.dp} is "
            f"{parallel.world_size} ranks, and here are {len(gpus)} GPUs; use a smaller layout, or start the ranks on "
            "several machines with torchrun"
        )
    found += engine_misfits(recipe, models, gpus)
    checks = (
        lambda spec, _: check_layout(spec, parallel),
        lambda spec, _: check_precision(spec, parallel, recipe.model.fp8),
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
    if spec.num_heads % tp:
        raise ValueError(f"rollout.tp: {tp} does not divide the model's {spec.num_heads} heads; use a divisor")
