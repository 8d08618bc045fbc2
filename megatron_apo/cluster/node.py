"""One node's part of a step of a job: `srun` starts this once on each node. It starts and guards what belongs there.

    check            look at this node (`check.py`)
    prepare          what is done once (`prepare.py`), on the first node
    estimate-vstar   stage 1's workers, one for each engine that the node has GPUs for
    train            ranks, or engines alone, as `plan.json` says
    evaluate         workers as in stage 1, of the trained model

Asked to end early (by a file that the job's script writes, by SIGUSR1, or by SIGTERM, which SLURM sends at once to all
of a step that it preempts or cancels), it finds out how long there is and tells its processes. SIGUSR2 ends it at once.
The first process that leaves with an error takes the others with it: of one that has ended early the code is in a file
(`codes`).
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_apo.cluster import check, prepare, slurm
from megatron_apo.cluster.plan import RECIPE, Plan, Step, sampling_arguments
from megatron_apo.config import Recipe, RecipeError, load_recipe
from megatron_apo.runtime.ending import EndedEarly, request
from megatron_apo.runtime.files import write_whole
from megatron_apo.runtime.job import be_node, give_notice, given_secret, put_logs, slurm_job, tell_notice_in
from megatron_apo.runtime.launch import RankFailed, last_lines, rank_log, spawn_node, write_to
from megatron_apo.runtime.signals import ASK, END, ENDED_EARLY, RANK_LOST
from megatron_apo.stages import start
from megatron_apo.telemetry.summary import RunSummary

ASKED = "asked"  # a file of the attempt, empty until the job's script asks the run to end (`tell_nodes`)
FAILURE = ".failure.json"
_ENDED = ".ended"
_MARGIN_S = 10.0  # of the time that a job has left: for ending what runs, once it has saved
_KILL_WAIT_S, _LOOK_AT_FILE_S = 30.0, 1.0
_LOOK_S = 0.1


def run(step: Step, folder: Path, token: str = "", within_s: float = 60.0) -> None:
    """folder: of this attempt, which the job has made. Exits with the step's code."""
    job = slurm_job()
    if job is None:
        raise ValueError("node: started by srun in a SLURM job alone; use sbatch launch/run_apo.sh")
    name = job.node
    if step == "check":
        line = json.dumps(asdict(check.look(name, folder / "check" / token, token, within_s)))
        os.write(1, f"{line}\n".encode())  # in one piece, among those of the others
        return
    plan, recipe = Plan.read(folder), load_recipe(str(folder / RECIPE), [])
    put_logs(folder, name)
    be_node()
    with tempfile.TemporaryDirectory(prefix="apo-node-") as own:
        tell_notice_in(Path(own))
        with _asked(job.job_id, folder):
            code = _code_of(lambda: _do(step, plan, recipe, name, folder), step, name, folder)
    write_whole(folder / f"{name}.{step}{_ENDED}", str(code))
    sys.exit(0 if code == ENDED_EARLY else code)


def _do(step: Step, plan: Plan, recipe: Recipe, name: str, folder: Path) -> None:
    if step == "prepare":
        prepare.prepare(plan, recipe)
    elif step in ("estimate-vstar", "evaluate"):
        _sample(step, plan, recipe, name, folder)
    elif name in plan.trainer_nodes:
        _train(plan, recipe, name, folder)
    else:
        from megatron_apo.stages import serve

        write_to(folder / f"{name}-engines.log", appending=True)
        serve.run(recipe)


def _train(plan: Plan, recipe: Recipe, name: str, folder: Path) -> None:
    secret = given_secret()
    assert secret is not None
    node = plan.ranks_of(name, recipe, secret)
    has_rank_0 = node.first_rank == 0
    with _followed(rank_log(folder, 0, node.label)) if has_rank_0 else nullcontext():
        with RunSummary(recipe.run.dir).phase("train") if has_rank_0 else nullcontext():
            spawn_node(["train", "--recipe", str(folder / RECIPE)], node, folder)


def _sample(step: Step, plan: Plan, recipe: Recipe, name: str, folder: Path) -> None:
    log = folder / f"{name}-{step}.log" if plan.place(name) else None  # the first node's is the job's own output
    if log:
        write_to(log, appending=True)
    arguments = sampling_arguments(step, recipe, folder / RECIPE)
    try:
        start.run_workers(arguments, recipe, plan.workers_of(name), plan.num_workers)
    except RankFailed as failure:
        raise RankFailed(last_lines(str(failure), log), failure.exit_code) from None


def _code_of(work: Callable[[], None], step: Step, name: str, folder: Path) -> int:
    """What becomes of the step here, as an exit code; a failure is written down."""
    try:
        work()
        return 0
    except (EndedEarly, KeyboardInterrupt):
        return ENDED_EARLY
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except RankFailed as failure:
        if failure.exit_code != ENDED_EARLY:
            _note_failure(folder, name, step, str(failure), failure.exit_code)
        return failure.exit_code
    except Exception as error:
        code = 2 if isinstance(error, RecipeError) else getattr(error, "exit_code", 1)
        text = str(error) if type(error).__module__.startswith("megatron_apo") else traceback.format_exc()
        _note_failure(folder, name, step, text, code)
        return code


def _note_failure(folder: Path, name: str, step: Step, text: str, code: int) -> None:
    told = {"at_s": time.time(), "node": name, "step": step, "code": code, "text": text}
    write_whole(folder / f"{name}{FAILURE}", json.dumps(told))


def first_failure(folder: Path) -> tuple[str, int]:
    """What failed first in an attempt, as its job says it, and with which exit code; empty if nothing is known."""
    found = []
    for path in folder.glob(f"*{FAILURE}"):
        with suppress(OSError, ValueError):
            found.append(json.loads(path.read_text()))
    if not found:
        return "", 0
    first = min(found, key=lambda one: (one["code"] == RANK_LOST, one["at_s"]))
    lines = first["text"].splitlines()
    text = [f"{first['step']} failed on {first['node']}: {lines[0] if lines else ''}", *lines[1:]]
    return "\n".join(text), int(first["code"])


def codes(folder: Path, step: Step) -> list[int]:
    """With which code each node's process has ended a step."""
    return [int(path.read_text()) for path in folder.glob(f"*.{step}{_ENDED}")]


@contextmanager
def _asked(job_id: str, folder: Path) -> Iterator[None]:
    """Within it SIGTERM and SIGUSR1 ask this node's processes to end, once it is known how long they have."""
    heard = threading.Event()

    def hear(number: int, frame: FrameType | None) -> None:
        names.append(signal.Signals(number).name)
        heard.set()

    def act() -> None:
        while not heard.wait(_LOOK_AT_FILE_S):
            if told := _told(folder):
                names.append(told["why"])
                break
        if is_over:
            return
        why, left_s = _why_and_how_long(job_id, names[0], folder)
        give_notice(why, left_s - _MARGIN_S)
        if is_over:
            return
        if left_s <= _MARGIN_S or any(folder.glob(f"*{FAILURE}")):
            os.kill(os.getpid(), END)
        request.ask(why, left_s - _MARGIN_S)

    names: list[str] = []
    is_over: list[bool] = []
    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, ASK)}
    thread = threading.Thread(target=act, name="asked", daemon=True)
    thread.start()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        is_over.append(True)
        heard.set()
        thread.join()


def tell_nodes(folder: Path, why: str, end_s: float | None) -> None:
    """The job's part: ask its nodes to end. By a file, since what srun is sent comes to every process of a step,
    graders and engines too. end_s: when the job is ended, seconds since the epoch, as far as it is known; for nodes in
    containers without SLURM's commands."""
    write_whole(folder / ASKED, json.dumps({"why": why, "end_s": end_s}))


def _why_and_how_long(job_id: str, signal_name: str, folder: Path) -> tuple[str, float]:
    """Of being asked to end by SLURM or by the job's script, as far as SLURM tells, or has told that script."""
    try:
        state = slurm.job_state(job_id)
        if not state.runs:
            return "the job is ended", slurm.kill_wait_s()
        left_s = math.inf if state.end_s is None else state.end_s - time.time()
        return "the job is preempted" if state.is_preempted else signal_name, left_s
    except slurm.SlurmError:
        if (end_s := _told(folder).get("end_s")) is not None:
            return signal_name, end_s - time.time()
        # SLURM's own signals come early, and SIGTERM half a minute before SIGKILL.
        return signal_name, _KILL_WAIT_S if signal_name == "SIGTERM" else math.inf


def _told(folder: Path) -> dict[str, Any]:
    """What `tell_nodes` has written. Opened each time: so a network file system shows what it has by now."""
    try:
        return json.loads((folder / ASKED).read_text() or "{}")
    except OSError:
        return {}


@contextmanager
def _followed(path: Path) -> Iterator[None]:
    """What a log grows by is written to this process's output."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    is_over = threading.Event()

    def follow() -> None:
        with path.open("rb") as log:
            while True:
                was_over = is_over.is_set()
                for chunk in iter(partial(log.read, 2**16), b""):
                    sys.stdout.buffer.write(chunk)
                sys.stdout.flush()
                if was_over:
                    return
                is_over.wait(_LOOK_S)

    thread = threading.Thread(target=follow, name="follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
