"""What is done once, on a run's first node, before anything is spent: a Megatron checkpoint is converted, and recipe
and model are held against the nodes."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path

from megatron_apo.cluster.plan import Plan
from megatron_apo.config import Recipe, RecipeError
from megatron_apo.learner.checkpoint import RECORD
from megatron_apo.preflight import check_job
from megatron_apo.runtime.launch import run_command
from megatron_apo.runtime.machine import Machine
from megatron_apo.values.claims import Claims
from megatron_apo.weights.hf_writer import PROVENANCE

_EXPIRES_S, _LOOK_S = 60.0, 1.0  # a job that converts, and has given no sign of life for so long, is not waited for


def prepare(plan: Plan, recipe: Recipe) -> None:
    """Raises RecipeError for what the steps to do would refuse of recipe, model and nodes."""
    convert_once(recipe)
    machine = replace(Machine.here(), ranks_here=plan.ranks_per_node, num_nodes=plan.trainers)
    check_job(converted(recipe), plan.todo, machine)


def converted(recipe: Recipe) -> Recipe:
    """The recipe with the Hugging Face folder that `convert_once` makes where `model.path` is a Megatron checkpoint."""
    if not _is_megatron(recipe):
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": _folder(recipe)})})


def convert_once(recipe: Recipe) -> None:
    """Of the jobs that want it at the same time, such as the tasks of an array, one converts and the others wait."""
    if not _is_megatron(recipe):
        return
    source, out = recipe.model.path, _folder(recipe)
    with Claims(out.parent, 1, lambda: {0} if out.exists() else set(), _EXPIRES_S, hangs_s=math.inf) as claims:
        while not out.exists():
            if claims.take() is None:
                time.sleep(_LOOK_S)
            else:
                run_command(["convert", "megatron-to-hf", "--megatron", str(source), "--out", str(out)])
        claims.remove()
    made_of = json.loads((out / PROVENANCE).read_text())["source"]
    if Path(made_of) != source.resolve():
        raise RecipeError(
            [f"run.dir: {out} was made of {made_of}, and model.path is {source}; give another run.dir, or remove it"]
        )


def _is_megatron(recipe: Recipe) -> bool:
    return (recipe.model.path / RECORD).is_file()


def _folder(recipe: Recipe) -> Path:
    return recipe.run.dir / "models" / "converted"
