"""A whole run on this machine alone: `launch/run_local.sh` becomes this process.

    the checkpoint, converted if needed -> doctor -> stage 1 -> stage 2 -> evaluation

These are the commands as they are run by hand, stage 1's once for each engine that the GPUs allow; what is complete is
skipped. SIGUSR1 asks the command that runs to end early, and none is begun after it; Ctrl-C and SIGTERM end it at once.
Started again, the run goes on with what is left.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_apo import doctor
from megatron_apo.cluster.plan import STAGES, Plan, Step, sampling_arguments
from megatron_apo.cluster.prepare import convert_once, converted
from megatron_apo.cluster.run import steps, told_complete
from megatron_apo.cluster.show import shown
from megatron_apo.config import Recipe, load_recipe
from megatron_apo.runtime.ending import EndedEarly, request
from megatron_apo.runtime.gpus import drivers_gpus
from megatron_apo.runtime.job import notice
from megatron_apo.runtime.launch import RankFailed, run_commands, write_recipe
from megatron_apo.runtime.signals import ASK, ENDED_EARLY
from megatron_apo.stages.start import worker_commands

NAME = "run-local"  # of the command, and of the recipe that it writes into the run
Command = tuple[Sequence[str], Mapping[str, str]]  # as `run_commands` takes it
_HERE = "here"


def run(recipe_name: str, overrides: Sequence[str], stage: int | None = None) -> None:
    """Returns when all is complete. stage: this one alone. Raises RecipeError, EndedEarly or RankFailed."""
    recipe = load_recipe(recipe_name, list(overrides))
    todo = steps(recipe, stage)
    if not todo:
        print(told_complete(recipe))
        return
    signal.signal(ASK, lambda number, frame: request.ask(*notice()))
    plan = _plan(recipe, len(drivers_gpus()))
    convert_once(recipe)
    recipe = converted(recipe)
    doctor.print_findings(recipe, todo[0])  # type: ignore[arg-type]  # what is left to do is a stage
    path = write_recipe(NAME, recipe)
    for step in todo:
        print(f"== {step}", flush=True)
        _do(step, _commands(step, plan, recipe, path))


def dry_run(recipe_name: str, overrides: Sequence[str], stage: int | None = None, gpus: int | None = None) -> None:
    """Say what `run` would do, and do nothing. gpus: as if this machine had so many."""
    recipe = load_recipe(recipe_name, list(overrides))
    print("\n".join(_lines(recipe, stage, len(drivers_gpus()) if gpus is None else gpus)))


def _lines(recipe: Recipe, stage: int | None, gpus: int) -> Iterator[str]:
    plan = _plan(recipe, gpus)
    path, todo = recipe.run.dir / f"{NAME}.yaml", steps(recipe, stage)
    for step in STAGES:
        yield step if step in todo else f"{step}: not asked for, or complete"
        if step in todo:
            for arguments, environment in _commands(step, plan, recipe, path, gpus):
                yield f"  {shown(arguments, environment)}"


def _plan(recipe: Recipe, gpus: int) -> Plan:
    """Raises ValueError, a line that names the key, for a recipe that needs more than this machine."""
    if recipe.rollout.placement == "dedicated":
        raise ValueError(
            "rollout.placement: dedicated engines have machines of their own, and run_local.sh has this one; use "
            "colocated, or sbatch launch/run_apo.sh"
        )
    return Plan.of(recipe, (_HERE,), gpus)


def _commands(step: Step, plan: Plan, recipe: Recipe, path: Path, gpus: int | None = None) -> Sequence[Command]:
    """Those that are a step, all at once."""
    arguments = sampling_arguments(step, recipe, path)
    if step == "estimate-vstar":
        return worker_commands(arguments, recipe, plan.workers_of(_HERE), plan.num_workers, gpus)
    return [(arguments, {})]  # of which the evaluation starts its workers


def _do(step: Step, commands: Sequence[Command]) -> None:
    try:
        if request.why is None:
            run_commands(commands)
            return
    except RankFailed as failure:
        if failure.exit_code != ENDED_EARLY:
            raise
    raise EndedEarly(f"{step} ended early ({request.why}); started again it goes on")
