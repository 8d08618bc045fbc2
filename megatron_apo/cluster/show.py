"""What a job would do, as text: `launch/run_apo.sh --dry-run`. Starts nothing and asks nobody."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_apo.cluster.plan import RECIPE, STAGES, Plan, Step, sampling_arguments
from megatron_apo.cluster.run import Options, check_command, load, srun, steps, told_complete, with_driver
from megatron_apo.config import Recipe
from megatron_apo.runtime.job import SECRET
from megatron_apo.stages.start import worker_commands

_ADDRESS, _PORT = "FIRST_NODE", 0  # known when the nodes have been looked at


def dry_run(recipe_name: str, overrides: Sequence[str], options: Options, nodes: int, gpus: int) -> None:
    """nodes, gpus: of the job, and of each of its nodes. Raises what a job would before it has looked at its nodes."""
    recipe = load(recipe_name, overrides)
    todo = steps(recipe, options.stage)
    if not todo:
        print(told_complete(recipe))
        return
    names = tuple(f"node{number}" for number in range(nodes - options.spare))
    plan = Plan.of(recipe, names, gpus, todo).first_at(_ADDRESS, [_PORT, _PORT])
    recipe = with_driver(recipe, plan)
    print("\n".join(_lines(recipe, plan, options, nodes, gpus)))


def _lines(recipe: Recipe, plan: Plan, options: Options, nodes: int, gpus: int) -> Iterator[str]:
    folder = recipe.run.dir / "logs" / "attempt-NNN"
    yield f"{nodes} nodes, {len(plan.nodes)} of them used" + (f", {options.spare} spare" if options.spare else "")
    for node in plan.nodes:
        yield f"  {node}: {_role(plan, recipe, node)}"
    yield f"environment of all that follows: {SECRET}, random and new in each attempt"
    yield f"FIRST_NODE: address of {plan.nodes[0]} as the others reach it; port 0: one that is free there"
    yield "\ncheck, all at once"
    for number in range(nodes):
        yield f"  {shlex.join(check_command(f'node{number}', folder, None, 'TOKEN', python=['python']))}"
    for step in ("prepare", *STAGES):
        if step not in ("prepare", *plan.todo):
            yield f"\n{step}: not asked for, or complete"
            continue
        working = plan.working(step, recipe)
        yield f"\n{step}\n  {_command(step, working, folder)}"
        for node in working:
            yield from (f"  {node}: {line}" for line in _processes(step, plan, recipe, node, folder, gpus))


def _role(plan: Plan, recipe: Recipe, node: str) -> str:
    place = plan.place(node)
    if node in plan.trainer_nodes:
        first = place * plan.ranks_per_node
        beside = "" if recipe.rollout.placement == "dedicated" else ", and engines beside them"
        last = first + plan.ranks_per_node - 1
        return (f"rank {first}" if first == last else f"ranks {first} to {last}") + beside
    return "engines" if node in plan.others(recipe) else "nothing in stage 2"


def _command(step: Step, nodes: Sequence[str], folder: Path) -> str:
    return shlex.join(srun(step, nodes, folder, None, python=["python"]))


def _processes(step: Step, plan: Plan, recipe: Recipe, node: str, folder: Path, gpus: int) -> Iterator[str]:
    """What the node's process starts."""
    if step == "prepare":
        yield "model.path is converted if it is a Megatron checkpoint; recipe and model are held against the nodes"
    elif step in ("estimate-vstar", "evaluate"):
        arguments = sampling_arguments(step, recipe, folder / RECIPE)
        for own, environment in worker_commands(arguments, recipe, plan.workers_of(node), plan.num_workers, gpus):
            yield shown(own, environment)
    elif node in plan.trainer_nodes:
        ranks = plan.ranks_of(node, recipe, secret="")
        first, last = (ranks.job(local_rank).variables() for local_rank in (0, ranks.num_ranks - 1))
        first.pop(SECRET)
        told = [f"{key}={value}" + (f"..{last[key]}" if last[key] != value else "") for key, value in first.items()]
        name = shlex.quote(str(folder / RECIPE))
        yield f"{ranks.num_ranks} x megatron-apo train --recipe {name}, each with {' '.join(told)}"
    else:
        yield f"its engines, which join {recipe.rollout.driver}"


def shown(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """A command as it is run by hand."""
    return shlex.join([*(f"{name}={value}" for name, value in environment.items()), "megatron-apo", *arguments])
