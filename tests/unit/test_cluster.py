"""What a run on the nodes of a SLURM job decides without SLURM: who does what, which nodes are bad, what is left to do,
and what failed first. The rest is in tests/slurm."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_apo.cluster import check, local, node, run, show, slurm
from megatron_apo.cluster.check import Found, bad_nodes
from megatron_apo.cluster.plan import Plan
from megatron_apo.cluster.run import Options
from megatron_apo.cluster.slurm import JobState, read_job_state
from megatron_apo.config import Recipe, RecipeError, build_recipe
from megatron_apo.runtime.ending import EndedEarly
from megatron_apo.runtime.job import SlurmJob, slurm_job

GOLDEN = Path(__file__).with_name("golden")
DEDICATED = ["rollout.placement=dedicated", "rollout.driver=node0:1"]


def recipe_of(*overrides: str) -> Recipe:
    return build_recipe({}, ["model.path=M", "data.train=T", "data.eval=E", "vstar.dir=V", "run.dir=R", *overrides])


def nodes(count: int) -> tuple[str, ...]:
    return tuple(f"n{number}" for number in range(count))


@pytest.mark.parametrize(
    ("overrides", "count", "gpus", "trainers", "ranks", "others", "workers"),
    [
        ([], 3, 0, 1, 1, 0, 1),  # without GPUs all ranks are on one node
        (["parallel.dp=4", "parallel.ranks_per_node=2"], 2, 0, 2, 2, 0, 1),
        (["parallel.tp=8", "parallel.dp=4", "rollout.tp=2", "rollout.replicas=16"], 4, 8, 4, 8, 0, 4),
        (["parallel.tp=8", "rollout.replicas=2", *DEDICATED], 3, 8, 1, 8, 2, 8),
        (["parallel.pp=2", "parallel.tp=2", "parallel.ranks_per_node=2", *DEDICATED], 3, 0, 2, 2, 1, 1),
    ],
)
def test_who_does_what(
    overrides: list[str], count: int, gpus: int, trainers: int, ranks: int, others: int, workers: int
) -> None:
    recipe = recipe_of(*overrides)
    plan = Plan.of(recipe, nodes(count), gpus)
    assert (plan.trainers, plan.ranks_per_node, len(plan.others(recipe))) == (trainers, ranks, others)
    assert plan.trainer_nodes == nodes(count)[:trainers] and plan.trainers * ranks >= recipe.parallel.world_size
    every = [worker for name in plan.nodes for worker in plan.workers_of(name)]
    assert every == list(range(count * workers)) and plan.num_workers == len(every)


@pytest.mark.parametrize(
    ("overrides", "count", "message"),
    [
        (
            ["parallel.dp=4", "parallel.ranks_per_node=2"],
            1,
            "parallel: .* = 4 ranks, 2 a node, take 2 nodes, and the job",
        ),
        (
            DEDICATED,
            1,
            "take 1 nodes, and rollout.placement=dedicated at least one more, and the job has 1; use sbatch",
        ),
        (["parallel.tp=3", "parallel.ranks_per_node=2"], 2, "parallel.ranks_per_node: 2 does not divide the 3 ranks"),
    ],
)
def test_nodes_that_are_too_few_are_told(overrides: list[str], count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.of(recipe_of(*overrides), nodes(count))


def test_the_tasks_of_an_array_share_the_shards_and_each_reads_its_plan(tmp_path: Path) -> None:
    plans = [Plan.of(recipe_of(), nodes(2)).in_array(task, 3) for task in range(3)]
    assert [worker for plan in plans for name in plan.nodes for worker in plan.workers_of(name)] == list(range(6))
    assert {plan.num_workers for plan in plans} == {6}
    plans[1].write(tmp_path)
    assert Plan.read(tmp_path) == plans[1]


SHOWN = (
    "JobId=7 JobName=apo UserId=root(0) Priority=1 JobState=RUNNING Reason=None Requeue=1 Restarts={restarts} "
    "TimeLimit=00:10:00 StartTime=2026-11-29T15:36:54 EndTime={end} Deadline=N/A PreemptTime={preempted} "
    "NodeList=h[0-1] Command=/home/me/launch/run_apo.sh recipe.yaml a=b WorkDir=/home/me Power=\n"
)


@pytest.mark.parametrize(
    ("end", "preempted", "expected"),
    [
        ("2026-11-29T15:46:54", "None", (True, False)),
        ("2026-11-29T15:37:06", "2026-11-29T15:36:58", (True, True)),
        ("Unknown", "None", (False, False)),
    ],
)
def test_what_slurm_says_of_a_job(end: str, preempted: str, expected: tuple[bool, bool]) -> None:
    state = read_job_state(SHOWN.format(restarts=2, end=end, preempted=preempted))
    assert (state.end_s is not None, state.is_preempted) == expected
    assert state.runs and state.restarts == 2
    assert not read_job_state(SHOWN.replace("RUNNING", "COMPLETING").format(restarts=0, end=end, preempted="None")).runs


FITS = Found("", "10.0.0.1", [1, 2], {"torch": "2.11.0", "vllm": "0.32.0"}, "3.12.3", ["H100"] * 8, 64, 2**40)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"n2": None}, {"n2": "it has told nothing"}),
        ({"n1": {"problems": ["it does not see RUN"]}}, {"n1": "it does not see RUN"}),
        (
            {"n3": {"versions": {"torch": "2.10.0", "vllm": "0.32.0"}}},
            {"n3": "versions: torch 2.10.0 in place of torch 2.11.0"},
        ),
        ({"n0": {"gpus": ["H100"] * 7}}, {"n0": "gpus: 7 x H100 in place of 8 x H100, and most have the other"}),
        ({"n0": {"gpus": ["A100"] * 8}}, {"n0": "gpus: 8 x A100 in place of 8 x H100"}),
        ({"n2": {"offset_s": 40.0}}, {"n2": "its clock is +40.0 s beside the others'"}),
        # Two that do not reach each other, and it shows of neither which.
        (
            {"n1": {"unreachable": ["n2"]}},
            {"n1": "it and n2 do not reach each other", "n2": "it and n1 do not reach each other"},
        ),
        # Who is cut off, and not who cannot reach it.
        (
            {"n1": {"unreachable": ["n0", "n2", "n3"]}, **{f"n{one}": {"unreachable": ["n1"]} for one in (0, 2, 3)}},
            {"n1": "it and n0, n2, n3 do not reach each other"},
        ),
    ],
)
def test_a_bad_node_is_named_and_no_other(changes: dict, expected: dict[str, str]) -> None:
    told = {
        name: replace(FITS, node=name, **(changes.get(name) or {}))
        for name in nodes(4)
        if changes.get(name, {}) is not None
    }
    bad = bad_nodes(nodes(4), told)
    assert list(bad) == list(expected)
    for name, problem in expected.items():
        assert problem in "; ".join(bad[name])
    shown = check.table(nodes(4), told, bad)
    assert shown.count("fits") == 4 - len(expected)


def test_a_node_alone_looks_at_itself(tmp_path: Path) -> None:
    check.prepare(tmp_path / "check", "token")
    found = check.look("n0", ["n0"], tmp_path / "check", "token", 5.0)
    assert (found.problems, found.unreachable, found.address) == ([], [], "127.0.0.1")
    assert abs(found.offset_s) < 1 and len(found.ports) == 2 and "torch" in found.versions
    other = check.look("n0", ["n0"], tmp_path / "check", "another's", 5.0)
    assert other.problems == [f"it does not see {tmp_path / 'check'}, which all nodes must share"]


def test_what_is_complete_is_skipped(tmp_path: Path) -> None:
    recipe = recipe_of(f"run.dir={tmp_path / 'run'}", f"vstar.dir={tmp_path / 'vstar'}")
    assert run.steps(recipe) == ["estimate-vstar", "train", "evaluate"]
    assert (run.steps(recipe, 1), run.steps(recipe, 2)) == (["estimate-vstar"], ["train", "evaluate"])
    (tmp_path / "vstar").mkdir()
    (tmp_path / "vstar" / "manifest.json").touch()
    assert run.steps(recipe) == ["train", "evaluate"] and run.steps(recipe, 1) == []
    (tmp_path / "run" / "checkpoints" / "hf").mkdir(parents=True)
    assert run.steps(recipe) == ["evaluate"]
    (tmp_path / "run" / "evaluation-checkpoints-hf.json").touch()
    assert run.steps(recipe) == []
    assert "evaluate" not in run.steps(recipe_of("data.eval=null"))


def test_a_job_says_where_rank_0_is(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    recipe_of(*DEDICATED).save(path)
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "driver:" not in line))
    loaded = run.load(str(path), [])
    plan = Plan.of(loaded, nodes(2)).first_at("10.0.0.7", [11, 12])
    assert run.with_driver(loaded, plan).rollout.driver == "10.0.0.7:12"
    assert run.with_driver(loaded, plan.first_at("fd00::7", [11, 12])).rollout.driver == "[fd00::7]:12"
    with pytest.raises(RecipeError) as caught:
        run.load(str(path), ["train.steps=-1"])
    assert len(caught.value.problems) >= 1 and caught.value.problems[0].startswith("train.steps")


def test_each_attempt_has_a_folder_and_the_newest_is_found(tmp_path: Path) -> None:
    folders = [run._new_attempt(tmp_path / "run") for _ in range(3)]
    assert [folder.name for folder in folders] == ["attempt-001", "attempt-002", "attempt-003"]
    assert (tmp_path / "run" / "logs" / "latest").resolve() == folders[-1].resolve()


def test_the_first_failure_is_told_and_not_who_only_missed_another(tmp_path: Path) -> None:
    assert node.first_failure(tmp_path) == ""
    for name, at_s, code in (("n0", 1.0, 76), ("n1", 3.0, 1), ("n2", 2.0, 137)):
        text = f"rank of {name} ended with status {code}; the end of LOG:\nlast line"
        told = {"at_s": at_s, "node": name, "step": "train", "code": code, "text": text}
        (tmp_path / f"{name}.failure.json").write_text(json.dumps(told))
    assert node.first_failure(tmp_path).splitlines() == [
        "train failed on n2: rank of n2 ended with status 137; the end of LOG:",
        "last line",
    ]


@pytest.mark.parametrize(
    ("name", "recipe", "overrides", "options", "count", "gpus"),
    [
        ("colocated", "qwen3-8b-16k", ["data.train=T", "data.eval=E"], Options(spare=1), 5, 8),
        (
            "dedicated",
            "quickstart",
            [
                *("model.path=M", "data.train=T", "data.eval=E", "vstar.dir=V", "run.dir=R"),
                *("parallel.ranks_per_node=1", "rollout.placement=dedicated"),
            ],
            Options(stage=2),
            3,
            0,
        ),
    ],
)
def test_a_dry_run(
    name: str,
    recipe: str,
    overrides: list[str],
    options: Options,
    count: int,
    gpus: int,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Golden files: GOLDEN=new writes them anew."""
    monkeypatch.chdir(tmp_path)
    show.dry_run(recipe, overrides, options, count, gpus)
    path, found = GOLDEN / f"dry-run-{name}.txt", capsys.readouterr().out
    if os.environ.get("GOLDEN") == "new":
        path.write_text(found)
    assert found == path.read_text()
    assert list(tmp_path.iterdir()) == []


def test_what_the_user_adds_to_srun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A container's image, mounts and Python; --dry-run shows them."""
    added = {"MEGATRON_APO_SRUN": "--container-image=apo.sqsh --container-mounts='/my data:/data'"}
    added["MEGATRON_APO_PYTHON"] = "apptainer exec --nv apo.sif python"
    command = run.srun("train", ["n0"], Path("R"), 4, environment=added)
    place = command.index("sh")
    assert command[place - 2 : place] == ["--container-image=apo.sqsh", "--container-mounts=/my data:/data"]
    assert command[place + 4 :][:5] == added["MEGATRON_APO_PYTHON"].split()
    plain = run.srun("train", ["n0"], Path("R"), 4, environment={})
    assert plain[: place - 1] == [*command[: place - 2], "sh"] and plain[place + 2] == sys.executable
    with pytest.raises(ValueError, match='^MEGATRON_APO_SRUN: No closing quotation: "--a=\'b"; quote it'):
        run.srun("train", ["n0"], Path("R"), 4, environment={"MEGATRON_APO_SRUN": "--a='b"})
    for name, words in added.items():
        monkeypatch.setenv(name, words)
    show.dry_run("qwen3-8b-16k", ["data.train=T", "data.eval=E"], Options(), 4, 8)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  srun ")]
    assert len(lines) == 4
    for line in lines:
        assert " --container-image=apo.sqsh '--container-mounts=/my data:/data' sh -c " in line
        assert " apptainer exec --nv apo.sif python -m megatron_apo.cli node " in line


def test_a_node_without_slurms_commands_has_been_told_when_the_job_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert node._why_and_how_long("7", "SIGTERM", tmp_path) == ("SIGTERM", 30.0)
    node.tell_nodes(tmp_path, "7", "--limit")  # the job's script cannot ask either
    assert node._why_and_how_long("7", "--limit", tmp_path) == ("--limit", math.inf)
    state = JobState("RUNNING", time.time() + 600, False, 0)
    monkeypatch.setattr(node.slurm, "job_state", lambda job_id: state)
    node.tell_nodes(tmp_path, "7", "SIGUSR1")
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    why, left_s = node._why_and_how_long("7", "SIGUSR1", tmp_path)
    assert why == "SIGUSR1" and 590 < left_s <= 600


def test_what_one_machine_would_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stage 1's workers share its GPUs out; what is complete is not run again."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    path = tmp_path / "recipe.yaml"
    recipe_of("parallel.tp=4", "rollout.tp=2", f"run.dir={tmp_path / 'R'}", f"vstar.dir={tmp_path / 'V'}").save(path)
    written = tmp_path / "R" / "run-local.yaml"
    lines = [
        "estimate-vstar",
        f"  CUDA_VISIBLE_DEVICES=4,5 megatron-apo estimate-vstar --recipe {written} --worker 0 --workers 2",
        f"  CUDA_VISIBLE_DEVICES=6,7 megatron-apo estimate-vstar --recipe {written} --worker 1 --workers 2",
        "train",
        f"  megatron-apo train --recipe {written}",
        "evaluate",
        f"  megatron-apo evaluate --recipe {written} --model {tmp_path}/R/checkpoints/hf",
    ]
    local.dry_run(str(path), [], gpus=4)
    assert capsys.readouterr().out.splitlines() == lines
    (tmp_path / "V").mkdir()
    (tmp_path / "V" / "manifest.json").touch()
    local.dry_run(str(path), [], gpus=4)
    assert capsys.readouterr().out.splitlines() == ["estimate-vstar: not asked for, or complete", *lines[3:]]
    assert not (tmp_path / "R").exists()
    with pytest.raises(ValueError, match="^parallel: .* = 4 ranks, 2 a node, take 2 nodes, and the job has 1"):
        local.dry_run(str(path), [], gpus=2)
    with pytest.raises(ValueError, match="^rollout.placement: dedicated .* sbatch launch/run_apo.sh"):
        local.dry_run(str(path), DEDICATED, gpus=4)


def test_a_job_is_asked_for_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ValueError, match=r"run_apo.sh: this is no SLURM job; submit it \(sbatch"):
        run.run("quickstart", [], Options())
    with pytest.raises(ValueError, match="node: started by srun in a SLURM job alone"):
        node.run("train", Path("folder"))


def test_a_job_that_does_not_run_is_not_requeued() -> None:
    assert not JobState("COMPLETING", None, False, 0).runs


def test_how_long_before_a_limit_a_run_is_asked_to_end() -> None:
    """What a step and a save take, the longest of the last three, half as much again, and a minute."""
    rows: list[dict] = [{"step": 1, "time/step_s": 100.0}, {"step": 1, "checkpoint/save_s": 20.0}]
    assert run.lead_s([]) is run.lead_s(rows[:1]) is None
    assert run.lead_s(rows) == 1.5 * 120 + 60
    rows += [{"step": step, "time/step_s": 10.0 * step} for step in (2, 3, 4)]
    assert run.lead_s(rows) == 1.5 * 60 + 60


def state_of(left_s: float | None, *, preempted: bool = False, name: str = "RUNNING") -> JobState:
    return JobState(name, None if left_s is None else time.time() + left_s, preempted, 0)


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., run._Run]:
    """An attempt of a job as SLURM would show it; its last step and save took 100 s (none: unknown)."""

    def make(state: JobState, *, known: bool = True, limit_s: float | None = None) -> run._Run:
        recipe = recipe_of(f"run.dir={tmp_path / 'run'}")
        rows = [{"step": 1, "time/step_s": 80.0}, {"step": 1, "checkpoint/save_s": 20.0}] if known else []
        monkeypatch.setattr(run, "read_metrics", lambda folder: rows)
        monkeypatch.setattr(slurm, "job_state", lambda *arguments: state)
        return run._Run(SlurmJob("7", "n[0-1]", "n0"), recipe, Options(limit_s=limit_s))

    return make


LEAD_S = 1.5 * 100 + 60


@pytest.mark.parametrize(
    ("state", "known", "expected"),
    [
        (state_of(3600), True, ""),
        (state_of(LEAD_S - 1), True, "the job's limit is"),
        (state_of(LEAD_S - 1), False, ""),  # nobody knows what a save takes: SLURM's signal is waited for
        (state_of(3600, preempted=True), True, "the job is preempted"),
        (state_of(None), True, ""),
    ],
)
def test_a_run_is_asked_to_end_by_its_own_clock(state: JobState, known: bool, expected: str, attempt) -> None:
    assert attempt(state, known=known)._is_due().startswith(expected)
    assert bool(attempt(state, known=known)._is_due()) == bool(expected)


@pytest.mark.parametrize(
    ("state", "known", "acted"),
    [
        (state_of(3600), True, True),  # somebody's, who means now
        (state_of(600), True, False),  # SLURM's, which comes earlier than there is need
        (state_of(600), False, True),
        (state_of(600, preempted=True), True, True),
        (state_of(LEAD_S - 1), True, True),
    ],
)
def test_slurms_signal_before_a_limit_waits_for_the_clock(state: JobState, known: bool, acted: bool, attempt) -> None:
    one = attempt(state, known=known)
    one._is_due()  # as it has looked before
    one._on_signal(signal.SIGUSR1)
    assert bool(one._asked or one._is_due()) == acted


def test_slurms_signal_after_the_clocks_is_no_second_request(attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    one = attempt(state_of(3600))
    one._hear("--limit")
    one._is_by_clock = True
    monkeypatch.setattr(run, "_AGAIN_S", 0.0)
    one._on_signal(signal.SIGUSR1)
    assert len(one._asked) == 1
    one._on_signal(signal.SIGTERM)
    assert len(one._asked) == 2


def test_a_limit_of_ones_own(attempt) -> None:
    assert attempt(state_of(3600), limit_s=1000)._is_due() == ""
    assert attempt(state_of(3600), limit_s=0)._is_due() == "--limit"


def test_several_signals_at_once_are_one_request(attempt) -> None:
    one = attempt(state_of(3600), known=False)
    for _ in range(3):
        one._on_signal(signal.SIGUSR1)
        one._on_signal(signal.SIGTERM)
    assert len(one._asked) == 1


@pytest.mark.parametrize(
    ("state", "asked", "attempts", "error", "message"),
    [
        (
            state_of(None, name="COMPLETING"),
            True,
            0,
            EndedEarly,
            "the job is COMPLETING, and is not requeued from here",
        ),
        (state_of(3600), False, 0, EndedEarly, "as a process of it was asked to; submitted again it goes on"),
        (state_of(3600), True, 1, run.JobFailed, "without a step, or a shard, more than when the job was requeued"),
    ],
)
def test_a_job_is_requeued_for_its_own_limit_alone_and_not_for_ever(
    state: JobState, asked: bool, attempts: int, error: type[Exception], message: str, attempt, monkeypatch
) -> None:
    monkeypatch.setattr(slurm, "requeue", lambda job_id: pytest.fail("it is requeued"))
    one = attempt(state)
    one._job = replace(one._job, attempt=attempts)
    one._began_at = run.progress(one._recipe)
    if asked:
        one._hear("SIGUSR1")
    with pytest.raises(error, match=message):
        one._end_early("train")


def test_a_task_of_an_array_is_a_job_of_its_own() -> None:
    """The last one's id is the array's as well."""
    found = slurm_job(
        {
            "SLURM_JOB_ID": "7",
            "SLURM_ARRAY_JOB_ID": "7",
            "SLURM_ARRAY_TASK_ID": "8",
            "SLURM_ARRAY_TASK_COUNT": "4",
            "SLURM_RESTART_COUNT": "2",
        }
    )
    assert found is not None
    assert (found.job_id, found.array_task, found.array_tasks, found.attempt) == ("7_8", 8, 4, 2)
    plan = Plan.of(recipe_of(), nodes(2)).in_array(8, 4)
    assert plan.num_workers == 8 and max(plan.workers_of("n1")) < 8
