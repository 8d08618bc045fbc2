"""What a run on the nodes of a SLURM job decides without SLURM: who does what, which nodes are bad, what is left to do,
and what failed first. The rest is in tests/slurm."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_apo.cluster import check, local, node, prepare, run, show, slurm
from megatron_apo.cluster.asking import Reason
from megatron_apo.cluster.check import Found, bad_nodes
from megatron_apo.cluster.plan import Plan
from megatron_apo.cluster.run import Options
from megatron_apo.cluster.slurm import JobState, read_job_state
from megatron_apo.config import Recipe, RecipeError, build_recipe
from megatron_apo.runtime.ending import EndedEarly
from megatron_apo.runtime.job import SlurmJob, slurm_job
from megatron_apo.values.shards import StoreRow
from megatron_apo.values.store import StoreWriter
from tests.stores import FINGERPRINT

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
        ({"n1": {"memory_bytes": 2**39}}, {"n1": "memory: 549.76 GB, and most have 1099.51 GB"}),
        ({"n1": {"memory_bytes": 2**40 - 2**36}}, {}),
        # Two that do not reach each other, and it shows of neither which.
        (
            {"n1": {"unreachable": ["n2"]}},
            {"n1": "it and n2 do not reach each other", "n2": "it and n1 do not reach each other"},
        ),
        # It can sum with neither of its neighbours, which can with theirs.
        (
            {"n1": {"unreachable": ["n0", "n2"]}, "n0": {"unreachable": ["n1"]}, "n2": {"unreachable": ["n1"]}},
            {"n1": "it and n0, n2 do not reach each other"},
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
    check.prepare(tmp_path / "check", "token", ["n0"])
    found = check.look("n0", tmp_path / "check", "token", 5.0)
    assert (found.problems, found.unreachable, found.address) == ([], [], "127.0.0.1")
    assert abs(found.offset_s) < 1 and len(found.ports) == 5 and "torch" in found.versions
    other = check.look("n0", tmp_path / "check", "another's", 5.0)
    assert other.problems == [f"it does not see {tmp_path / 'check'}, which all nodes must share"]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_neighbours_meet_in_pairs(count: int) -> None:
    """Each two once, and in a turn nobody twice."""
    met = {name: check._pairs(name, nodes(count)) for name in nodes(count)}
    for name, own in met.items():
        assert len(own) == min(2, count - 1) and len({turn for turn, _ in own}) == len(own)
        for turn, pair in own:
            (other,) = set(pair) - {name}
            assert (turn, pair) in met[other]


def test_what_is_complete_is_skipped(tmp_path: Path) -> None:
    recipe = recipe_of(f"run.dir={tmp_path / 'run'}", f"vstar.dir={tmp_path / 'vstar'}")
    assert run.steps(recipe) == ["estimate-vstar", "train", "evaluate"]
    assert (run.steps(recipe, 1), run.steps(recipe, 2)) == (["estimate-vstar"], ["train", "evaluate"])
    (tmp_path / "run").mkdir()
    (shard,) = make_sampled(recipe).glob("shard-*")
    assert run.steps(recipe) == ["train", "evaluate"] and run.steps(recipe, 1) == []
    shard.rename(tmp_path / "elsewhere")  # as one that is damaged is to be taken away
    assert run.steps(recipe, 1) == ["estimate-vstar"]
    (tmp_path / "elsewhere").rename(shard)
    make_trained(recipe)
    assert run.steps(recipe) == ["evaluate"]
    (tmp_path / "run" / "evaluation-checkpoints-hf.json").touch()
    assert run.steps(recipe) == []
    assert "evaluate" not in run.steps(recipe_of("data.eval=null"))


def make_sampled(recipe: Recipe) -> Path:
    """A store, of a prompt."""
    writer = StoreWriter(recipe.vstar.dir, FINGERPRINT, 1)
    writer.write_shard(0, [StoreRow("0" * 32, "0" * 32, [1.0] * 2, [9] * 2, ["stop"] * 2)])
    writer.finish()
    return recipe.vstar.dir


def make_trained(recipe: Recipe) -> None:
    """What is looked at."""
    trained = recipe.run.dir / "checkpoints" / "hf"
    trained.mkdir(parents=True)
    rows = [{"step": step, "time/step_s": 1.0} for step in range(1, recipe.train.steps + 1)]
    (recipe.run.dir / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_a_model_of_fewer_steps_is_not_the_recipes(tmp_path: Path) -> None:
    recipe = recipe_of(f"run.dir={tmp_path / 'run'}", f"vstar.dir={tmp_path / 'vstar'}", "train.steps=4")
    make_trained(recipe)
    assert run.steps(recipe, 2) == ["evaluate"]
    recipe.train.steps = 6
    assert run.steps(recipe, 2) == ["train", "evaluate"]


def test_the_evaluation_of_another_model_is_not_the_new_ones(tmp_path: Path) -> None:
    recipe = recipe_of(f"run.dir={tmp_path / 'run'}", f"vstar.dir={tmp_path / 'vstar'}", "train.steps=4")
    (tmp_path / "run").mkdir()
    result = tmp_path / "run" / "evaluation-checkpoints-hf.json"
    result.touch()
    os.utime(result, (1.0, 1.0))
    make_trained(recipe)
    assert run.steps(recipe, 2) == ["evaluate"]


@pytest.fixture
def megatron(tmp_path: Path) -> Recipe:
    """A run of what looks like a Megatron checkpoint."""
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "checkpoint.json").touch()
    return recipe_of(f"run.dir={tmp_path / 'run'}", f"model.path={tmp_path / 'megatron'}")


def test_one_of_several_jobs_converts_the_model(megatron: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    converted = prepare.converted(megatron).model.path
    assert converted == megatron.run.dir / "models" / "converted"
    began = []

    def convert(arguments: list[str]) -> None:
        began.append(arguments)
        time.sleep(0.5)
        assert arguments[-1] == str(converted)
        converted.mkdir()
        (converted / "conversion.json").write_text(json.dumps({"source": str(megatron.model.path)}))

    monkeypatch.setattr(prepare, "run_command", convert)
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(prepare.convert_once, megatron) for _ in range(3)]:
            done.result()
    assert len(began) == 1
    assert [path.name for path in converted.parent.iterdir()] == ["converted"]


def test_what_was_converted_of_another_model_is_refused(megatron: Recipe) -> None:
    converted = prepare.converted(megatron).model.path
    converted.mkdir(parents=True)
    (converted / "conversion.json").write_text(json.dumps({"source": "/models/another"}))
    with pytest.raises(RecipeError, match="^run.dir: .*converted was made of /models/another, and model.path is .*"):
        prepare.convert_once(megatron)


def test_a_hugging_face_folder_is_not_converted() -> None:
    assert prepare.converted(recipe_of()) == recipe_of()
    prepare.convert_once(recipe_of())
    assert not Path("R").exists()


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
    assert node.first_failure(tmp_path) == ("", 0)
    for name, at_s, code in (("n0", 1.0, 76), ("n1", 3.0, 1), ("n2", 2.0, 137)):
        text = f"rank of {name} ended with status {code}; the end of LOG:\nlast line"
        told = {"at_s": at_s, "node": name, "step": "train", "code": code, "text": text}
        (tmp_path / f"{name}.failure.json").write_text(json.dumps(told))
    text, code = node.first_failure(tmp_path)
    assert code == 137
    assert text.splitlines() == [
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
    assert "--export=ALL" in command
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
    assert len(lines) == 4 + 4  # the check's, one a node, and a step's
    for line in lines:
        assert " --container-image=apo.sqsh '--container-mounts=/my data:/data' sh -c " in line
        assert " apptainer exec --nv apo.sif python -m megatron_apo.cli node " in line


def test_a_node_without_slurms_commands_has_been_told_when_the_job_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert node._why_and_how_long("7", "SIGTERM", tmp_path) == ("SIGTERM", 30.0)
    node.tell_nodes(tmp_path, "--limit", None)  # the job's script cannot ask either
    assert node._why_and_how_long("7", "--limit", tmp_path) == ("--limit", math.inf)
    node.tell_nodes(tmp_path, "SIGUSR1", time.time() + 600)
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
    make_sampled(recipe_of(f"vstar.dir={tmp_path / 'V'}"))
    local.dry_run(str(path), [], gpus=4)
    assert capsys.readouterr().out.splitlines() == ["estimate-vstar: not asked for, or complete", *lines[3:]]
    assert not (tmp_path / "R").exists()
    with pytest.raises(ValueError, match="^parallel: .* = 4 ranks, 2 a node, take 2 nodes, and the job has 1"):
        local.dry_run(str(path), [], gpus=2)
    with pytest.raises(ValueError, match="^rollout.placement: dedicated .* sbatch launch/run_apo.sh"):
        local.dry_run(str(path), DEDICATED, gpus=4)


def test_stage_1_alone_takes_any_number_of_nodes() -> None:
    """Also one task of an array, of a recipe that trains on sixteen."""
    recipe = recipe_of("parallel.tp=8", "parallel.dp=16", "rollout.tp=4", *DEDICATED)
    plan = Plan.of(recipe, nodes(1), 8, ["estimate-vstar"])
    assert (plan.workers_per_node, list(plan.workers_of("n0"))) == (2, [0, 1])
    with pytest.raises(ValueError, match="take 16 nodes, and rollout.placement=dedicated at least one more"):
        Plan.of(recipe, nodes(1), 8, ["estimate-vstar", "train"])


def test_dedicated_engines_need_room() -> None:
    recipe = recipe_of("parallel.tp=8", "rollout.tp=4", "rollout.replicas=5", *DEDICATED)
    assert Plan.of(recipe, nodes(4), 8).trainers == 1
    with pytest.raises(ValueError, match="^rollout.replicas: 5 .* 2 nodes without ranks have room for 4; use fewer"):
        Plan.of(recipe, nodes(3), 8)


def test_a_job_is_asked_for_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ValueError, match=r"run_apo.sh: this is no SLURM job; submit it \(sbatch"):
        run.run("quickstart", [], Options())
    with pytest.raises(ValueError, match="node: started by srun in a SLURM job alone"):
        node.run("train", Path("folder"))


def test_how_long_before_a_limit_a_run_is_asked_to_end() -> None:
    """What a step and a save take, the longest of the last three, half as much again, and a minute."""
    rows: list[dict] = [{"step": 1, "time/step_s": 100.0}, {"step": 1, "checkpoint/save_s": 20.0}]
    assert run.lead_s([]) is run.lead_s(rows[:1]) is None
    assert run.lead_s(rows) == 1.5 * 120 + 60
    rows += [{"step": step, "time/step_s": 10.0 * step} for step in (2, 3, 4)]
    assert run.lead_s(rows) == 1.5 * 60 + 60


RUNS = JobState("RUNNING", None, False, 0)


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., run._Run]:
    """The second attempt of a job, which SLURM lets run; nothing was done in it."""

    def make(reason: Reason | None = None) -> run._Run:
        monkeypatch.setattr(slurm, "job_state", lambda *arguments: RUNS)
        monkeypatch.setattr(slurm, "requeue", lambda job_id: pytest.fail("it is requeued"))
        monkeypatch.setattr(run, "_SHOWN_S", 0.0)
        one = run._Run(SlurmJob("7", "n[0-1]", "n0", attempt=1), recipe_of(f"run.dir={tmp_path / 'run'}"), Options())
        one._folder, one._asking.reason = tmp_path, reason
        one._began_at = run.progress(one._recipe)
        return one

    return make


def test_a_job_is_not_requeued_for_ever(attempt: Callable[..., run._Run]) -> None:
    with pytest.raises(
        run.JobFailed, match=r"train ended early \(--limit\) without a step, or a shard, more than when"
    ):
        attempt(Reason("--limit", "limit"))._end_early("train")


def test_a_job_that_ended_for_no_limit_is_left(attempt: Callable[..., run._Run]) -> None:
    with pytest.raises(EndedEarly, match="^train ended early: as a process of it was asked to; submitted again"):
        attempt()._end_early("train")
    with pytest.raises(EndedEarly, match="^train ended early: by SIGTERM, which is no limit; submitted again"):
        attempt(Reason("SIGTERM", "SIGTERM"))._end_early("train")


@pytest.mark.parametrize(
    ("asked", "code", "early", "failure", "expected"),
    [
        (False, 0, True, False, ""),  # a process of it was asked
        (False, 0, False, False, "train ended with status 0, and is not complete"),
        (False, 137, False, False, "train ended with status 137, and is not complete"),
        (False, 137, True, False, "train ended with status 137"),  # a node died, and srun ended the others
        (False, 1, True, True, "train failed on n0: why"),
        (False, 1, False, True, "train failed on n0: why"),
        (True, 0, True, False, ""),
        (True, 137, False, False, ""),  # asked twice
        (True, 1, False, True, "train failed on n0: why"),
        (True, 1, True, True, ""),  # it goes on from what was saved before
    ],
)
def test_a_step_that_is_not_complete_has_failed_or_was_asked_to_end(
    asked: bool, code: int, early: bool, failure: bool, expected: str, attempt: Callable[..., run._Run], tmp_path: Path
) -> None:
    (tmp_path / "n0.train.ended").write_text("75" if early else "137")
    if failure:
        node._note_failure(tmp_path, "n0", "train", "why", 3)
    one = attempt(Reason("SIGUSR1", "SIGUSR1") if asked else None)
    if not expected:
        one._require_early_end("train", code)
        return
    with pytest.raises(run.JobFailed, match=f"^{expected}") as caught:
        one._require_early_end("train", code)
    assert caught.value.exit_code == (3 if failure else code or 1)


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
