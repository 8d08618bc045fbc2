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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_apo.cluster import check, slurm
from megatron_apo.cluster.asking import Asking, what_next
from megatron_apo.cluster.node import ASKED, codes, first_failure, tell_nodes
from megatron_apo.cluster.plan import RECIPE, Plan, Step
from megatron_apo.cluster.prepare import converted
from megatron_apo.config import Recipe, RecipeError, load_recipe
from megatron_apo.learner.checkpoint import exported, next_step
from megatron_apo.rollout.evaluation import evaluation_result
from megatron_apo.runtime.ending import EndedEarly
from megatron_apo.runtime.job import SlurmJob, new_secret, share_secret, slurm_job
from megatron_apo.runtime.signals import END, ENDED_EARLY, RANK_LOST
from megatron_apo.telemetry.metrics import read_metrics
from megatron_apo.telemetry.recorder import SAVE_S, STEP_S
from megatron_apo.telemetry.units import duration
from megatron_apo.values.store import is_whole

_LOOK_S = 0.1
_LOOK_AT_LIMIT_S = 20.0
_LEAD_S = 60.0  # for what else ends
_SHOWN_S = 60.0  # for what other nodes have written to be seen here
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
        self._asking = Asking(options.limit_s)
        self._look_s = 0.0  # when SLURM is asked again for the job's end
        self._end_s: float | None = None  # as it has told last, seconds since the epoch
        self._sruns: list[subprocess.Popen[bytes]] = []  # that run

    def __enter__(self) -> _Run:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, lambda number, frame: self._asking.hear(number))
        self._folder = _new_attempt(self._recipe.run.dir)
        (self._folder / ASKED).touch()
        self._began_at = progress(self._recipe)
        share_secret(new_secret())
        return self

    def __exit__(self, *exception: object) -> None:
        for srun in self._sruns:
            srun.terminate()  # and its tasks with it
        for srun in self._sruns:
            srun.wait()

    def all_steps(self) -> None:
        """In their order, those that are not complete."""
        todo = steps(self._recipe, self._options.stage)
        if not todo:
            print(told_complete(self._recipe))
            return
        found = self._check()
        nodes = tuple(found)
        plan = Plan.of(self._recipe, nodes, len(found[nodes[0]].gpus), todo)
        plan = plan.in_array(self._job.array_task or 0, self._job.array_tasks)
        plan = plan.first_at(found[nodes[0]].address, found[nodes[0]].ports)
        self._recipe = with_driver(self._recipe, plan)
        if "train" in todo and (idle := set(nodes) - set(plan.working("train", self._recipe))):
            print(f"without ranks or engines in stage 2: {', '.join(sorted(idle))}")
        plan.write(self._folder)
        self._recipe.save(self._folder / RECIPE)
        self._warn_of_time()
        self._do("prepare", plan.working("prepare", self._recipe))
        self._recipe = converted(self._recipe)
        self._recipe.save(self._folder / RECIPE)
        for step in todo:
            self._do(step, plan.working(step, self._recipe))

    def _check(self) -> dict[str, check.Found]:
        """What the nodes told that the run can have, in their order. Raises JobFailed, naming bad ones.

        Where some are bad the others are looked at once more: they have not summed a number without them.
        """
        nodes = good = slurm.node_names(self._job.node_list)
        wanted, all_bad = len(nodes) - self._options.spare, dict[str, list[str]]()
        if wanted < 1:
            raise ValueError(
                f"--spare: {self._options.spare} of the job's {len(nodes)} nodes; use at most {len(nodes) - 1}"
            )
        while True:
            found = self._look(good)
            bad = check.bad_nodes(good, found)
            print(check.table(good, found, bad), flush=True)
            all_bad |= bad
            good = [node for node in good if node not in bad]
            if len(good) < wanted:
                lines = [f"{node}: {'; '.join(problems)}" for node, problems in all_bad.items()]
                held = f" (--spare {self._options.spare})" if self._options.spare else ""
                raise JobFailed(
                    "\n".join([f"{len(good)} of {len(nodes)} nodes can be used, {wanted} are needed{held}:", *lines])
                )
            if not bad:
                break
        if spare := good[wanted:]:
            print(f"held back: {', '.join(spare)}", flush=True)
        return {node: found[node] for node in good[:wanted]}

    def _look(self, nodes: Sequence[str]) -> dict[str, check.Found]:
        """What those of the nodes that answer tell of themselves. Raises EndedEarly.

        By an `srun` for each: one for all is ended as soon as a node cannot be reached.
        """
        token = secrets.token_hex(8)
        sources = [*self._recipe.sources("train"), *self._recipe.sources("eval")]
        own: list[Path | str | None] = [*self._recipe.folders.values(), *(source.path for source in sources)]
        must_see = [str(path) for path in own if path is not None and Path(path).exists()]
        found: dict[str, check.Found] = {}
        with (
            (self._folder / "check.log").open("a+") as output,
            _file_in(self._recipe.vstar.dir, f".check-{token}") as seen,
        ):
            check.prepare(self._folder / "check" / token, token, nodes, [*must_see, *seen])
            start = output.tell()
            for node in nodes:
                self._start(check_command(node, self._folder, self._job.cpus, token), output)
            self._wait(2 * _CHECK_S)
            output.seek(start)
            for line in output:
                with suppress(ValueError, TypeError):
                    one = check.Found(**json.loads(line))
                    found[one.node] = one
        if self._asking.reason or not self._goes_on():
            self._end_early("check")
        return found

    def _do(self, step: Step, nodes: Sequence[str]) -> None:
        """One step. Returns when it is complete. Raises JobFailed, or EndedEarly."""
        if not self._asking.reason and self._goes_on():
            print(f"== {step} on {', '.join(nodes)}", flush=True)
            self._start(srun(step, nodes, self._folder, self._job.cpus))
            code = self._wait()
            # A node of engines that lost sight of rank 0 when all was done has missed nothing.
            if code in (0, RANK_LOST) and self._is_complete(step):
                return
            if self._goes_on():
                _wait_until_told(self._folder, step, nodes)
                self._require_early_end(step, code)
        self._end_early(step)

    def _require_early_end(self, step: Step, code: int) -> None:
        """A step that has ended, and is not complete, was asked to or has failed. Raises JobFailed."""
        (why, its_code), early = first_failure(self._folder), ENDED_EARLY in codes(self._folder, step)
        if self._asking.reason:
            has_failed = bool(why) and not early
        else:
            has_failed = code != 0 or not early
        if has_failed:
            why = why or f"{step} ended with status {code}, and is not complete; srun has said why"
            raise JobFailed(f"{why}\nlogs: {self._folder}", its_code or code or 1)

    def _start(self, command: Sequence[str], output: IO[str] | None = None) -> None:
        self._sruns.append(subprocess.Popen(command, stdout=output, stdin=subprocess.DEVNULL))

    def _is_complete(self, step: Step) -> bool:
        """A network file system may take a while to show what other nodes have written."""
        end = time.monotonic() + _SHOWN_S
        while ENDED_EARLY not in codes(self._folder, step):
            if step not in steps(self._recipe):
                return True
            if time.monotonic() > end:
                break
            time.sleep(1.0)
        return False

    def _goes_on(self) -> bool:
        """Whether SLURM lets the job run: its script hears nothing of a preemption."""
        state = slurm.job_state(self._job.job_id, slurm.PATIENCE_S)
        return state.runs and not state.is_preempted

    def _warn_of_time(self) -> None:
        """Where a step and a save have taken longer than this job has, or nothing can be saved at all."""
        if unsaved := self._recipe.why_unsaved:
            print(f"warning: a training with {unsaved} cannot be saved: requeued, it begins again", flush=True)
        if (wanted_s := lead_s(read_metrics(self._recipe.run.dir))) is None:
            return
        end_s = slurm.job_state(self._job.job_id, slurm.PATIENCE_S).end_s
        limits = {"--time": math.inf if end_s is None else end_s - time.time(), "--limit": self._options.limit_s}
        for name, left_s in limits.items():
            if left_s is not None and left_s < wanted_s:
                print(
                    f"warning: {name} ends this job in {duration(left_s)}, and a step and a save of this run need "
                    f"{duration(wanted_s)}; nothing may be saved: give it longer",
                    flush=True,
                )

    def _wait(self, within_s: float = math.inf) -> int:
        """For what was started; it is told when this job is asked to end. The greatest exit code."""
        num_told, end, codes = 0, time.monotonic() + within_s, [0]
        while self._sruns:
            self._ask_slurm()
            reason = self._asking.reason
            if num_told == 0 and reason:
                tell_nodes(self._folder, reason.why, self._end_s)
                num_told = 1
            if num_told == 1 and self._asking.is_again:
                for srun in self._sruns:
                    srun.send_signal(END)
                num_told = 2
            if time.monotonic() > end:
                for srun in self._sruns:
                    srun.terminate()  # and its tasks with it
            time.sleep(_LOOK_S)
            ended = [srun.returncode for srun in self._sruns if srun.poll() is not None]
            codes += [code if code >= 0 else 128 - code for code in ended]
            self._sruns = [srun for srun in self._sruns if srun.returncode is None]
        return max(codes)

    def _ask_slurm(self) -> None:
        """Now and then: whether the run has to end."""
        if self._asking.reason or (time.monotonic() < self._look_s and not self._asking.is_waiting):
            return
        self._look_s = time.monotonic() + _LOOK_AT_LIMIT_S
        state = None
        with suppress(slurm.SlurmError):
            state = slurm.job_state(self._job.job_id)
            self._end_s = math.inf if state.end_s is None else state.end_s
        self._asking.look(state, lead_s(read_metrics(self._recipe.run.dir)), time.time())

    def _end_early(self, step: Step) -> None:
        """See to it that the job goes on later, where it should. Raises EndedEarly, or JobFailed for a job that would
        be requeued for ever."""
        state, reason = slurm.job_state(self._job.job_id, slurm.PATIENCE_S), self._asking.reason
        what, why = what_next(reason, state)
        if what == "leave":
            raise EndedEarly(f"{step} ended early: {why}")
        if what == "wait":
            print(f"{step} ended early: the job is preempted, and waits to be requeued by SLURM", flush=True)
            self._wait_to_be_ended((state.end_s or time.time()) - time.time() + _ENDS_S)
        elif self._job.attempt and not self._has_got_on():
            raise JobFailed(
                f"{step} ended early ({reason.why if reason else ''}) without a step, or a shard, more than when the "
                "job was requeued; give it a longer limit"
            )
        print(f"{step} ended early ({reason.why if reason else 'preempted'}): requeueing the job", flush=True)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        slurm.requeue(self._job.job_id)
        self._wait_to_be_ended(_ENDS_S)
        raise EndedEarly("the job was requeued, but not ended")

    def _has_got_on(self) -> bool:
        """A network file system may take a while to show what other nodes have written."""
        end = time.monotonic() + _SHOWN_S
        while progress(self._recipe) == self._began_at:
            if time.monotonic() > end:
                return False
            time.sleep(1.0)
        return True

    def _wait_to_be_ended(self, within_s: float) -> None:
        """Raises EndedEarly as soon as SLURM ends this process."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(max(0.0, within_s))


@contextmanager
def _file_in(folder: Path, name: str) -> Iterator[list[str]]:
    """A file that those see who share the folder; none where it cannot be written."""
    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError:
        yield []
        return
    try:
        yield [str(path)]
    finally:
        path.unlink(missing_ok=True)


def _wait_until_told(folder: Path, step: Step, nodes: Sequence[str]) -> None:
    """Until each node's process is seen to have said how it ended; one that was killed says nothing."""
    end = time.monotonic() + _SHOWN_S
    while len(codes(folder, step)) < len(nodes) and time.monotonic() < end:
        time.sleep(1.0)


def progress(recipe: Recipe) -> tuple[int, int, int]:
    """What grows while a run goes on: shards, saved steps, and complete steps of the job."""
    shards = len([*recipe.vstar.dir.glob("shard-*.parquet"), *recipe.run.dir.glob("evaluation-*/*/shard-*.parquet")])
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
    complete: dict[Step, bool] = {
        "estimate-vstar": is_whole(recipe.vstar.dir) or not recipe.needs_store,
        "train": is_trained(recipe),
        "evaluate": not recipe.sources("eval") or _is_evaluated(recipe),
    }
    wanted: Sequence[Step] = ["estimate-vstar"] if stage == 1 else ["train", "evaluate"] if stage == 2 else [*complete]
    return [step for step in wanted if not complete[step]]


def told_complete(recipe: Recipe) -> str:
    return f"{recipe.run.dir}: all is complete"


def is_trained(recipe: Recipe) -> bool:
    """Whether the model was exported after the recipe's last step."""
    done = max((row["step"] for row in read_metrics(recipe.run.dir) if STEP_S in row), default=0)
    return exported(recipe.run.dir).exists() and done == recipe.train.steps


def _is_evaluated(recipe: Recipe) -> bool:
    """And not another model, that was there before."""
    trained = exported(recipe.run.dir)
    result = evaluation_result(recipe.run.dir, trained)
    return result.exists() and trained.exists() and result.stat().st_mtime >= trained.stat().st_mtime


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
        "--export=ALL",  # the job's secret too, whatever sbatch was told
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
    node: str,
    folder: Path,
    cpus: int | None,
    token: str,
    python: Sequence[str] = (sys.executable,),
    environment: Mapping[str, str] = os.environ,
) -> list[str]:
    """`srun` of the check of one node, which tells in a whole line."""
    command = srun("check", [node], folder, cpus, python, environment)
    command = [word for word in command if word != _UNBUFFERED]
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
