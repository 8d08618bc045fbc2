"""A whole run on the nodes of a SLURM job: `launch/run_apo.sh` becomes this process, on the job's first node.

    check every node -> look at the checkpoint -> stage 1 -> stage 2 -> evaluation

Each of these is one `srun`, with one process a node (`node.py`). What is complete is skipped, so that a job that was
requeued goes on where it stopped. Of one that ends early this process decides what becomes of it:

    SIGUSR1, the limit is near, --limit     the run saves, and the job is requeued from here
    preemption (SIGTERM to the steps, or    the run saves; SLURM requeues the job, and this process waits for that: a
    SIGUSR1 where SLURM is set up so)       job whose script has ended is not requeued
    scancel (SIGTERM, the job is ended)     the run saves if there is time, and the job stays cancelled

Asked a second time, the run ends at once.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_apo.cluster import check, slurm
from megatron_apo.cluster.node import ASKED, NODES, codes, first_failure, tell_nodes
from megatron_apo.cluster.plan import RECIPE, Plan, Step
from megatron_apo.config import Recipe, RecipeError, load_recipe
from megatron_apo.learner.checkpoint import RECORD, exported, next_step
from megatron_apo.preflight import training_problems
from megatron_apo.rollout.evaluation import evaluation_result
from megatron_apo.runtime.ending import EndedEarly
from megatron_apo.runtime.job import SlurmJob, new_secret, share_secret, slurm_job
from megatron_apo.runtime.launch import run_command
from megatron_apo.runtime.machine import Machine
from megatron_apo.runtime.signals import END, ENDED_EARLY
from megatron_apo.telemetry.metrics import read_metrics
from megatron_apo.telemetry.recorder import SAVE_S, STEP_S
from megatron_apo.values.store import MANIFEST

_LOOK_S = 0.1
_LOOK_AT_LIMIT_S = 20.0
_LEAD_S = 60.0  # for what else ends
_SHOWN_S = 60.0  # for what other nodes have written to be seen here
_EARLIEST_S = 900.0  # before a limit, that a signal may come for it
_AGAIN_S = 2.0  # one request may come as several signals
_CHECK_S = 120.0  # for nodes to begin with their check
_KILL_ON_BAD_EXIT, _UNBUFFERED = "--kill-on-bad-exit=1", "--unbuffered"
SRUN = "MEGATRON_APO_SRUN"  # more words for srun, such as a container's image and mounts
PYTHON = "MEGATRON_APO_PYTHON"  # what is Python on the nodes; by default this process's own
_ENDS_S = 180.0  # slurmctld looks at graces that have passed twice a minute
_ANY_DRIVER = "127.0.0.1:1"  # as long as it is not known which node is the first


class JobFailed(RuntimeError):
    """A step failed. `exit_code` is the step's."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Options:
    """spare: nodes that are held back for bad ones. stage: 1 or 2 alone. limit_s: end, and requeue, after so long."""

    spare: int = 0
    stage: int | None = None
    limit_s: float | None = None


def run(recipe_name: str, overrides: Sequence[str], options: Options) -> None:
    """Returns when all is complete. Raises JobFailed, or EndedEarly."""
    job = slurm_job()
    if job is None:
        raise ValueError(
            "run_apo.sh: this is no SLURM job; submit it (sbatch --nodes=N launch/run_apo.sh RECIPE), or see what it "
            "would do (launch/run_apo.sh --dry-run --nodes N RECIPE)"
        )
    with _Run(job, load(recipe_name, overrides), options) as one:
        one.all_steps()


def load(recipe_name: str, overrides: Sequence[str]) -> Recipe:
    """A recipe, whose `rollout.driver` is the job's to say."""
    try:
        return load_recipe(recipe_name, list(overrides))
    except RecipeError as error:
        if not any(line.startswith("rollout.driver: missing") for line in error.problems):
            raise
    return load_recipe(recipe_name, [*overrides, f"rollout.driver={_ANY_DRIVER}"])


class _Run:
    """One attempt."""

    def __init__(self, job: SlurmJob, recipe: Recipe, options: Options):
        self._job, self._recipe, self._options = job, recipe, options
        self._asked: list[tuple[float, str]] = []
        self._start_s = time.monotonic()
        self._look_s = 0.0  # when SLURM is asked again for the job's end
        self._end_s: float | None = None
        self._lead_s: float | None = None  # as long before it the run is to end
        self._is_by_clock = False  # that it was asked to
        self._usr1 = False  # has come, and was not acted upon
        self._step: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Run:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, lambda number, frame: self._on_signal(signal.Signals(number)))
        self._folder = _new_attempt(self._recipe.run.dir)
        (self._folder / ASKED).touch()
        self._began_at = progress(self._recipe)
        share_secret(new_secret())
        return self

    def __exit__(self, *exception: object) -> None:
        if self._step is not None and self._step.poll() is None:
            self._step.terminate()  # srun kills its tasks then
            self._step.wait()

    def all_steps(self) -> None:
        """In their order, those that are not complete."""
        todo = steps(self._recipe, self._options.stage)
        if not todo:
            print(f"{self._recipe.run.dir}: all is complete")
            return
        found = self._check()
        self._recipe = with_hugging_face_model(self._recipe)
        nodes = tuple(found)
        plan = Plan.of(self._recipe, nodes, len(found[nodes[0]].gpus))
        plan = plan.in_array(self._job.array_task or 0, self._job.array_tasks)
        plan = plan.first_at(found[nodes[0]].address, found[nodes[0]].ports)
        self._recipe = with_driver(self._recipe, plan)
        if idle := set(nodes) - set(plan.working("train", self._recipe)):
            print(f"without ranks or engines in stage 2: {', '.join(sorted(idle))}")
        _require_training(self._recipe, plan, "train" in todo)
        plan.write(self._folder)
        self._recipe.save(self._folder / RECIPE)
        for step in todo:
            self._do(step, plan.working(step, self._recipe))

    def _check(self) -> dict[str, check.Found]:
        """What the nodes told that the run can have, in their order. Raises JobFailed, naming bad ones."""
        nodes = slurm.node_names(self._job.node_list)
        token = secrets.token_hex(8)
        check.prepare(self._folder / "check", token)
        (self._folder / NODES).write_text(json.dumps(nodes))
        command = check_command(nodes, self._folder, self._job.cpus, token)
        found: dict[str, check.Found] = {}
        with (self._folder / "check.log").open("w+") as output:
            self._step = subprocess.Popen(command, stdout=output, stdin=subprocess.DEVNULL)
            self._wait(2 * _CHECK_S)
            output.seek(0)
            for line in output:
                with suppress(ValueError, TypeError):
                    one = check.Found(**json.loads(line))
                    found[one.node] = one
        if self._asked or not self._goes_on():
            self._end_early("check")
        bad = check.bad_nodes(nodes, found)
        print(check.table(nodes, found, bad), flush=True)
        good = [node for node in nodes if node not in bad]
        wanted = len(nodes) - self._options.spare
        if len(good) < wanted:
            lines = [f"{node}: {'; '.join(problems)}" for node, problems in bad.items()]
            held = f" (--spare {self._options.spare})" if self._options.spare else ""
            raise JobFailed(
                "\n".join([f"{len(good)} of {len(nodes)} nodes can be used, {wanted} are needed{held}:", *lines])
            )
        if spare := good[wanted:]:
            print(f"held back: {', '.join(spare)}", flush=True)
        return {node: found[node] for node in good[:wanted]}

    def _do(self, step: Step, nodes: Sequence[str]) -> None:
        """One step. Returns when it is complete."""
        if not self._asked and self._goes_on():
            print(f"== {step} on {', '.join(nodes)}", flush=True)
            self._step = subprocess.Popen(srun(step, nodes, self._folder, self._job.cpus), stdin=subprocess.DEVNULL)
            code = self._wait()
            if code == 0 and self._is_complete(step):
                return
            why = first_failure(self._folder)
            if ENDED_EARLY not in codes(self._folder, step) and self._goes_on() and (why or not self._asked):
                why = why or f"{step} ended with status {code}, and is not complete; srun has said why"
                raise JobFailed(f"{why}\nlogs: {self._folder}", code or 1)
        self._end_early(step)

    def _is_complete(self, step: Step) -> bool:
        """A network file system may take a while to show what other nodes have written."""
        end = time.monotonic() + _SHOWN_S
        while step in steps(self._recipe):
            if ENDED_EARLY in codes(self._folder, step) or time.monotonic() > end:
                return False
            time.sleep(1.0)
        return True

    def _goes_on(self) -> bool:
        """Whether SLURM lets the job run: its script hears nothing of a preemption."""
        state = slurm.job_state(self._job.job_id, slurm.PATIENCE_S)
        return state.runs and not state.is_preempted

    def _wait(self, within_s: float = math.inf) -> int:
        """For the step that runs; it is told when this job is asked to end. Its exit code."""
        assert self._step is not None
        num_told, end = 0, time.monotonic() + within_s
        while (code := self._step.poll()) is None:
            if not self._asked and (why := self._is_due()):
                self._hear(why)
                self._is_by_clock = True
            if num_told == 0 and self._asked:
                tell_nodes(self._folder, self._job.job_id, self._asked[0][1])
                num_told = 1
            if num_told == 1 and len(self._asked) > 1:
                self._step.send_signal(END)
                num_told = 2
            if time.monotonic() > end:
                self._step.terminate()  # and its tasks with it
            time.sleep(_LOOK_S)
        return code if code >= 0 else 128 - code

    def _on_signal(self, number: signal.Signals) -> None:
        if number == signal.SIGUSR1 and self._is_by_clock:
            return  # for the same limit, and no second request
        if number == signal.SIGUSR1 and self._lead_s is not None:
            self._usr1 = True  # `_is_due` sees whether there is need of it yet
            self._look_s = 0.0
            return
        self._hear(number.name)

    def _hear(self, name: str) -> None:
        now = time.monotonic()
        if not self._asked or now - self._asked[-1][0] > _AGAIN_S:
            self._asked.append((now, name))

    def _is_due(self) -> str:
        """Why the run has to end now, by its own clock; empty if it does not."""
        limit_s = self._options.limit_s
        if limit_s is not None and time.monotonic() - self._start_s > limit_s:
            return "--limit"
        if time.monotonic() > self._look_s:
            self._look_s = time.monotonic() + _LOOK_AT_LIMIT_S
            self._lead_s = lead_s(read_metrics(self._recipe.run.dir))
            try:
                state = slurm.job_state(self._job.job_id)
            except slurm.SlurmError:
                return "SIGUSR1" if self._usr1 else ""
            self._end_s = state.end_s if state.runs else None
            is_meant = state.is_preempted or self._end_s is None or self._end_s - time.time() > _EARLIEST_S
            if self._usr1 and is_meant:  # not for a limit, before which it may come earlier than there is need
                return "SIGUSR1"
            if state.is_preempted:
                return "the job is preempted"
        if self._end_s is None or self._lead_s is None or self._end_s - time.time() > self._lead_s:
            return ""
        return f"the job's limit is {self._end_s - time.time():.0f} s away"

    def _end_early(self, step: Step) -> None:
        """See to it that the job goes on later, where it should. Raises EndedEarly."""
        state = slurm.job_state(self._job.job_id, slurm.PATIENCE_S)
        if not state.runs:
            raise EndedEarly(f"{step} ended early: the job is {state.name}, and is not requeued from here")
        if state.is_preempted:
            print(f"{step} ended early: the job is preempted, and waits to be requeued by SLURM", flush=True)
            self._wait_to_be_ended((state.end_s or time.time()) - time.time() + _ENDS_S)
        elif not self._asked:
            raise EndedEarly(f"{step} ended early, as a process of it was asked to; submitted again it goes on")
        elif self._job.attempt and progress(self._recipe) == self._began_at:
            raise JobFailed(
                f"{step} ended early ({self._asked[0][1]}) without a step, or a shard, more than when the job was "
                "requeued; give it a longer limit"
            )
        print(
            f"{step} ended early ({self._asked[0][1] if self._asked else 'preempted'}): requeueing the job", flush=True
        )
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        slurm.requeue(self._job.job_id)
        self._wait_to_be_ended(_ENDS_S)
        raise EndedEarly("the job was requeued, but not ended")

    def _wait_to_be_ended(self, within_s: float) -> None:
        """Raises EndedEarly as soon as SLURM ends this process."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(max(0.0, within_s))


def progress(recipe: Recipe) -> tuple[int, int, int]:
    """What grows while a run goes on: shards, saved steps, and complete steps of the job."""
    shards = len(list(recipe.vstar.dir.glob("shard-*.parquet")))
    return shards, next_step(recipe.run.dir), -len(steps(recipe))


def lead_s(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """How long before a limit a run has to be asked to end, so that the step that it is at is finished and saved; None
    before it has saved once. rows: of metrics.jsonl."""
    found = {name: [row[name] for row in rows if row.get(name) is not None][-3:] for name in (STEP_S, SAVE_S)}
    if not all(found.values()):
        return None
    return 1.5 * sum(max(values) for values in found.values()) + _LEAD_S


def steps(recipe: Recipe, stage: int | None = None) -> list[Step]:
    """Those that are not complete yet."""
    trained = exported(recipe.run.dir)
    outcome: dict[Step, Path] = {
        "estimate-vstar": recipe.vstar.dir / MANIFEST,
        "train": trained,
        "evaluate": evaluation_result(recipe.run.dir, trained),
    }
    wanted: Sequence[Step] = ["estimate-vstar"] if stage == 1 else ["train", "evaluate"] if stage == 2 else [*outcome]
    if recipe.data.eval is None:
        wanted = [step for step in wanted if step != "evaluate"]
    return [step for step in wanted if not outcome[step].exists()]


def srun(
    step: Step,
    nodes: Sequence[str],
    folder: Path,
    cpus: int | None,
    python: Sequence[str] = (sys.executable,),
    environment: Mapping[str, str] = os.environ,
) -> list[str]:
    """The command that runs a step: one process on each of these nodes. `environment` says what the user adds to it."""
    return [
        "srun",
        f"--job-name={step}",
        f"--nodelist={','.join(nodes)}",
        f"--nodes={len(nodes)}",
        f"--ntasks={len(nodes)}",
        "--ntasks-per-node=1",
        *([f"--cpus-per-task={cpus}"] if cpus else []),
        "--wait=0",
        _KILL_ON_BAD_EXIT,
        _UNBUFFERED,
        *_words(SRUN, environment),
        "sh",
        "-c",
        'trap "" USR1; exec "$@"',  # until it is listened to
        "sh",
        *(_words(PYTHON, environment) or python),
        "-m",
        "megatron_apo.cli",
        "node",
        step,
        str(folder),
    ]


def check_command(
    nodes: Sequence[str],
    folder: Path,
    cpus: int | None,
    token: str,
    python: Sequence[str] = (sys.executable,),
    environment: Mapping[str, str] = os.environ,
) -> list[str]:
    """`srun` of the check: each node tells for itself, in whole lines."""
    command = srun("check", nodes, folder, cpus, python, environment)
    command = [word for word in command if word not in (_KILL_ON_BAD_EXIT, _UNBUFFERED)]
    return [*command, "--token", token, "--within", f"{_CHECK_S:g}"]


def _words(variable: str, environment: Mapping[str, str]) -> list[str]:
    """What a shell would make of it. Raises ValueError, a line that names it."""
    try:
        return shlex.split(environment.get(variable, ""))
    except ValueError as error:
        raise ValueError(f"{variable}: {error}: {environment[variable]!r}; quote it as for a shell") from None


def with_driver(recipe: Recipe, plan: Plan) -> Recipe:
    """The recipe with where rank 0 takes engines in, if they have nodes of their own."""
    if recipe.rollout.placement != "dedicated":
        return recipe
    address = f"[{plan.address}]" if ":" in plan.address else plan.address
    rollout = recipe.rollout.model_copy(update={"driver": f"{address}:{plan.driver_port}"})
    return recipe.model_copy(update={"rollout": rollout})


def with_hugging_face_model(recipe: Recipe) -> Recipe:
    """Convert `model.path` where it is a Megatron checkpoint, once."""
    path = recipe.model.path
    if not (path / RECORD).is_file():
        return recipe
    out = recipe.run.dir / "models" / "converted"
    if not out.exists():
        run_command(["convert", "megatron-to-hf", "--megatron", str(path), "--out", str(out)])
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": out})})


def _require_training(recipe: Recipe, plan: Plan, trains: bool) -> None:
    """Before anything is spent: what stage 2 would refuse of recipe, model and nodes. Raises RecipeError.

    Where the nodes have a Python of their own, this one cannot tell what is installed there: rank 0 asks.
    """
    if not trains or os.environ.get(PYTHON):
        return
    machine = replace(Machine.here(), ranks_here=plan.ranks_per_node, num_nodes=plan.trainers)
    if found := training_problems(recipe, recipe.model.folders, machine):
        raise RecipeError(found)


def _new_attempt(run_dir: Path) -> Path:
    """A folder for the logs of this attempt; `latest` is a link to it."""
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(path.name[8:]) for path in logs.glob("attempt-*") if path.name[8:].isdecimal()), default=0)
    while True:
        folder = logs / f"attempt-{number:03d}"
        try:
            folder.mkdir()
            break
        except FileExistsError:  # another task of a job array
            number += 1
    link = logs / f".latest-{number}"
    link.symlink_to(folder.name)
    link.replace(logs / "latest")
    return folder
