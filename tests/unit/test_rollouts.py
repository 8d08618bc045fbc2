"""What a step sees of engines that fail: restarted, given the weights, proven, and only then asked again. The
counterparts are HTTP servers without a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_apo.config import build_recipe
from megatron_apo.data.order import sample_seed
from megatron_apo.data.prompts import LoadedPrompts, Prompt
from megatron_apo.rewards.pool import RewardPool
from megatron_apo.rollout import fleet as fleet_file
from megatron_apo.rollout import rollouts as rollouts_file
from megatron_apo.rollout.inputs import Inputs
from megatron_apo.rollout.rollouts import Rollouts
from megatron_apo.rollout.server import ServerDied
from megatron_apo.rollout.weight_sync import SyncError
from megatron_apo.runtime.ending import Interrupted
from megatron_apo.telemetry.samples import read_samples
from tests.engines import GENERATE, LIMIT_S, Server, until
from tests.unit.test_rollout_sharing import log_probs, one_rank
from tests.weights import TensorSource

PROMPTS = [
    Prompt(prompt_id=f"p{n}", text="1+2=", text_hash="h", token_ids=(5, 6, n), answer="3", row=n) for n in range(8)
]
MEETING = ["start", "/init_weight_transfer_engine", "/get_world_size"]
UPDATE = ["/pause?mode=wait&clear_cache=true", "/start_weight_update", "/update_weights", "/finish_weight_update"]
UPDATE += ["/collective_rpc", "/resume"]
WEIGHT = torch.arange(6.0)


class Job:
    """Rollouts over `servers`; `events`: what happened to all of them, with "offloaded" and "back" of the trainer's
    memory. graded: texts that were asked to be graded."""

    def __init__(self, folder: Path, number: int):
        self.events: list[str] = []
        self.servers = [Server(folder / f"engine{index}") for index in range(number)]
        self.graded = 0

    @contextmanager
    def offloaded(self) -> Iterator[None]:
        for server in self.servers:
            server.events.append("offloaded")
        yield
        for server in self.servers:
            server.events.append("back")

    def decode(self, ids: Any, **_: Any) -> str:
        self.graded += 1
        return "3"

    def events_of(self, number: int) -> list[str]:
        """Since the last call, without the trainer's."""
        found = [event for event in self.servers[number].events if event not in ("offloaded", "back")]
        self.servers[number].events.clear()
        return found


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[Rollouts, Job]]]:
    def make(number: int, *overrides: str) -> tuple[Rollouts, Job]:
        job = Job(tmp_path, number)
        monkeypatch.setattr(fleet_file, "VLLMServer", lambda *_, replica, **__: job.servers[replica or 0])
        inputs = Inputs(
            tokenizer=SimpleNamespace(decode=job.decode),  # type: ignore[arg-type]
            renderer=SimpleNamespace(asks_to_think=False),  # type: ignore[arg-type]
            training=SimpleNamespace(prompts=PROMPTS),  # type: ignore[arg-type]
            evaluation=LoadedPrompts([], {}, ""),
            stop_token_ids=(1,),
        )
        paths = ["model.path=m", "data.train=t", "vstar.dir=v", "reward.name=arithmetic", f"run.dir={tmp_path}/run"]
        settings = [f"rollout.replicas={number}", f"rollout.request_timeout_s={LIMIT_S}", "sync.probe_sequences=1"]
        recipe = build_recipe({}, [*paths, *settings, *overrides])
        return Rollouts(recipe, one_rank(), [], None, inputs, job.offloaded), job  # type: ignore[arg-type]

    monkeypatch.setattr(rollouts_file, "Gather", lambda *_, **__: TensorSource({"w": WEIGHT}))
    monkeypatch.setattr(rollouts_file, "policy_log_probs", log_probs(0.0))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield make
    dist.destroy_process_group()


def test_an_engine_that_dies_in_a_step_serves_again_after_the_next_sync_and_its_proof(
    start: Callable[..., tuple[Rollouts, Job]], capfd: pytest.CaptureFixture[str]
) -> None:
    rollouts, job = start(2)
    with rollouts:
        rollouts.sync(0)
        first = rollouts.sample(PROMPTS, 0)
        assert first.prompt_ids == tuple(prompt.prompt_id for prompt in PROMPTS) and set(first.reward_B) <= {0.0, 1.0}
        assert rollouts.step_metrics() == {"rollout/engine0/responses": 4, "rollout/engine1/responses": 4}
        assert job.events_of(1) == [*MEETING, *UPDATE, *["generate"] * 4]
        job.servers[1].faults[GENERATE], job.servers[1].delay_s = "die", 0.2
        second = rollouts.sample(PROMPTS, 1)
        assert len(second) == 8 and rollouts.step_metrics()["rollout/engine0/responses"] == 8
        assert job.graded == 16, "each response is graded once"
        job.servers[1].delay_s = 0
        rollouts.sync(1)
        asked = job.events_of(1)
        assert asked[asked.index("start") :] == [*MEETING, *UPDATE, "score"]
        third = rollouts.sample(PROMPTS, 2)
        assert third.weight_version_B.tolist() == [1] * 8
        assert rollouts.step_metrics() == {"rollout/engine0/responses": 4, "rollout/engine1/responses": 4}
        assert job.events_of(0).count("start") == 1
    said = [line for line in capfd.readouterr().out.splitlines() if "rollout engine" in line]
    assert [line.partition(" (")[0] for line in said] == [
        "rollout engine 1 died in step 1",
        "rollout engine 1 serves again, with the weights of version 1; its log-probs differ from the trainer's by at "
        "most 0",
    ]


def test_a_prompts_responses_are_a_group_of_one_request(start: Callable[..., tuple[Rollouts, Job]]) -> None:
    """In the order of prompts and samples, with other seeds for what is drawn again; those of an engine that dies are
    asked again whole, and each is graded once."""
    rollouts, job = start(2)
    prompts = [*PROMPTS[:3], PROMPTS[0]]
    with rollouts:
        rollouts.sync(0)
        batch = rollouts.sample(prompts, 0, num_samples=3)
        assert batch.prompt_ids == tuple(prompt.prompt_id for prompt in prompts for _ in range(3))
        assert batch.groups == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]] and job.graded == 12
        seeds = [sample_seed(0, "train", 0, prompt.prompt_id) for prompt in PROMPTS[:3]]
        expected = [seed + i for seed in (*seeds, seeds[0] + 3) for i in range(3)]
        first = [batch.sequences.response(row)[0] for row in range(12)]
        assert first == [seed % 1000 for seed in expected]
        assert rollouts.step_metrics() == {"rollout/engine0/responses": 6, "rollout/engine1/responses": 6}
        again = rollouts.sample(prompts, 0, num_samples=3, draw=1)
        assert not {again.sequences.response(row)[0] for row in range(12)} & {*first}
        assert rollouts.step_metrics() == {"rollout/engine0/responses": 12, "rollout/engine1/responses": 12}
        job.servers[1].faults[GENERATE] = "die"
        third = rollouts.sample(prompts, 0, num_samples=3)
        assert [third.sequences.response(row)[0] for row in range(12)] == first and job.graded == 36
        assert sum(rollouts.step_metrics().values()) == 12


def test_a_restarted_engine_without_the_weights_ends_the_run(start: Callable[..., tuple[Rollouts, Job]]) -> None:
    rollouts, job = start(2)
    with rollouts:
        rollouts.sync(0)
        job.servers[1].faults[GENERATE] = "die"
        rollouts.sample(PROMPTS, 0)
        job.servers[1].score = -0.5
        with pytest.raises(SyncError, match=r"by 0\.5 \(allowed: 0\.0005\)"):
            rollouts.sync(1)


def test_an_engine_starts_again_while_the_trainers_memory_is_elsewhere(
    start: Callable[..., tuple[Rollouts, Job]],
) -> None:
    rollouts, job = start(2, "rollout.sleep_while_training=true")
    server = job.servers[1]
    with rollouts:
        rollouts.sync(0)
        server.events.clear()
        server.faults[GENERATE] = "die"
        rollouts.sample(PROMPTS, 0)
        events = [event for event in server.events if event != "generate"]
        assert events == ["offloaded", "/wake_up", "start", "/sleep?level=1", "back"]
        server.events.clear()
        rollouts.sync(1)
        assert server.events == [
            *(*MEETING[1:], "/wake_up?tags=weights", *UPDATE),
            *("offloaded", "/wake_up", "score", "/sleep?level=1", "back"),
        ]
        server.events.clear()
        server.faults["/update_weights"] = "die"  # now: it has no memory to start in before the next turn
        rollouts.sync(2)
        assert server.events == ["/wake_up?tags=weights", *UPDATE[:3]]
        server.events.clear()
        assert len(rollouts.sample(PROMPTS, 1)) == 8
        assert server.events == ["offloaded", "start", "/sleep?level=1", "back"]
        rollouts.sync(3)
        rollouts.sample(PROMPTS, 2)
        assert rollouts.step_metrics() == {"rollout/engine0/responses": 4, "rollout/engine1/responses": 4}


def test_when_the_last_engine_dies_all_are_restarted_and_the_step_goes_on(
    start: Callable[..., tuple[Rollouts, Job]], capfd: pytest.CaptureFixture[str]
) -> None:
    rollouts, job = start(2)
    with rollouts:
        rollouts.sync(0)
        for server in job.servers:
            server.faults[GENERATE] = "die"
        assert len(rollouts.sample(PROMPTS, 0)) == 8
        assert job.graded == 8
        for number in range(2):
            asked = job.events_of(number)
            again = asked[len(asked) - asked[::-1].index("start") - 1 :]
            assert again[:10] == [*MEETING, *UPDATE, "score"] and set(again[10:]) <= {"generate"}
        job.servers[0].faults[GENERATE] = job.servers[1].faults[GENERATE] = "die"
        assert len(rollouts.sample(PROMPTS, 1)) == 8, "once a step"
        start_again = [server.start for server in job.servers]
        for server, begin in zip(job.servers, start_again, strict=True):
            server.faults[GENERATE] = "die"
            server.start = lambda begin=begin, server=server: (begin(), server.faults.update({"/pause": "die"}))
        with pytest.raises(ServerDied, match=r"died twice in step 2. The end of its log:\nthe end of its log"):
            rollouts.sample(PROMPTS, 2)
    assert capfd.readouterr().out.count("the last rollout engine died in step") == 3


def test_weights_that_an_engine_does_not_hold_end_the_run(start: Callable[..., tuple[Rollouts, Job]]) -> None:
    rollouts, job = start(2)
    with rollouts:
        rollouts.sync(0)
        job.servers[1].worker.held_weights = lambda: {"results": [{"wrong": {}, "held": ["0"]}]}
        with pytest.raises(SyncError, match="does not hold the weights that were sent: w"):
            rollouts.sync(1)


def test_what_was_gathered_wrongly_is_named_by_the_proof(
    start: Callable[..., tuple[Rollouts, Job]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine holds what was sent, and that is not what the policy has."""
    rollouts, job = start(1)
    honest = TensorSource.buckets

    def flipped(self: TensorSource, *arguments: Any, **options: Any) -> Iterator[Any]:
        for bucket, buffer in honest(self, *arguments, **options):
            if num_flips.pop():
                buffer[0] ^= 1
            yield bucket, buffer

    num_flips = [False] * 9 + [True]
    monkeypatch.setattr(TensorSource, "buckets", flipped)
    with rollouts:
        rollouts.sync(0)
        job.servers[0].score = 1.0  # far from the policy's, so that a tensor is blamed
        with pytest.raises(SyncError, match="stale: w$"):
            rollouts.prove()


def test_an_engine_whose_update_raised_is_restarted_and_not_asked_again(
    start: Callable[..., tuple[Rollouts, Job]], capfd: pytest.CaptureFixture[str]
) -> None:
    rollouts, job = start(2)
    with rollouts:
        rollouts.sync(0)
        rollouts.sample(PROMPTS, 0)
        for number in range(2):
            job.events_of(number)
        job.servers[1].faults["/update_weights"] = 500
        rollouts.sync(1)
        assert job.events_of(1) == [*UPDATE[:3], *MEETING, *UPDATE, "score"]
        assert job.events_of(0) == UPDATE  # once
        rollouts.sample(PROMPTS, 1)
        assert rollouts.step_metrics() == {"rollout/engine0/responses": 4, "rollout/engine1/responses": 4}
        assert "a weight update failed in step 0 (" in capfd.readouterr().out
        begin = job.servers[1].start

        def start_faulty() -> None:
            begin()
            job.servers[1].faults["/update_weights"] = 500

        job.servers[1].start = start_faulty  # type: ignore[method-assign]
        job.servers[1].faults["/update_weights"] = 500
        with pytest.raises(SyncError, match=r"failed twice in step 1: .*/update_weights with 500: it raised"):
            rollouts.sync(2)


def test_one_engine_whose_update_raised_is_restarted_as_well(start: Callable[..., tuple[Rollouts, Job]]) -> None:
    rollouts, job = start(1)
    with rollouts:
        job.servers[0].faults["/finish_weight_update"] = 500
        rollouts.sync(0)
        assert job.events_of(0) == [*MEETING, *UPDATE[:4], *MEETING, *UPDATE, "score"]
        assert len(rollouts.sample(PROMPTS, 0)) == 8
        assert rollouts.step_metrics() == {}


def test_an_evaluation_is_of_all_engines(start: Callable[..., tuple[Rollouts, Job]]) -> None:
    rollouts, job = start(2, "eval.samples=2")
    rollouts.inputs.evaluation.prompts.extend(PROMPTS[:4])
    with rollouts:
        rollouts.sync(0)
        found = rollouts.evaluate(0)
        assert (found.num_prompts, found.samples_per_prompt, job.graded) == (4, 2, 12)
        written = read_samples(rollouts._recipe.run.dir)[0]
        assert [(one.reward, one.seen, one.reason) for one in written] == [(found.greedy, None, "")] * 4
        assert [len(server.answered) for server in job.servers] == [6, 6]
        job.servers[0].faults[GENERATE] = "die"
        assert rollouts.evaluate(1) == found
        assert job.graded == 24


def test_an_evaluation_beside_other_work_is_what_it_is_alone(start: Callable[..., tuple[Rollouts, Job]]) -> None:
    rollouts, job = start(2, "eval.samples=2")
    rollouts.inputs.evaluation.prompts.extend(PROMPTS[:4])
    with rollouts:
        rollouts.sync(0)
        alone = rollouts.evaluate(0)
        for server in job.servers:
            server.held = True
        rollouts.begin_evaluation(0)
        until(lambda: sum(len(server.asked) for server in job.servers) == 24)  # while this thread does as it likes
        for server in job.servers:
            server.held = False
        job.servers[0].die()  # the other is asked its requests
        job.servers[1].release(6)
        assert rollouts.end_evaluation(0) == alone
        assert job.graded == 24, "each response is graded once"
        rollouts.sync(1)
        assert rollouts.sample(PROMPTS, 1).weight_version_B.tolist() == [1] * 8


def test_engines_that_die_beside_other_work_are_restarted_with_the_next_weights(
    start: Callable[..., tuple[Rollouts, Job]], capfd: pytest.CaptureFixture[str]
) -> None:
    """That they die in a step's sampling and again in the evaluation beside its learning is twice in a step."""
    rollouts, job = start(1)
    rollouts.inputs.evaluation.prompts.extend(PROMPTS[:4])
    with rollouts:
        rollouts.sync(0)
        for step, fault in enumerate(({}, {GENERATE: "die"})):
            job.servers[0].faults.update(fault)
            rollouts.sample(PROMPTS, step)
            job.servers[0].held = True
            job.servers[0].asked.clear()
            rollouts.begin_evaluation(step)
            until(lambda: job.servers[0].asked)
            job.servers[0].die()
            assert rollouts.end_evaluation(step) is None
            assert f"the evaluation after step {step} is lost: no engine is left (" in capfd.readouterr().out
            job.servers[0].held = False
            if not fault:
                rollouts.sync(1)
                assert "died in step 0 (" in capfd.readouterr().out
        with pytest.raises(ServerDied, match="it died twice in step 1"):
            rollouts.sync(2)


def test_nothing_else_is_asked_beside_an_evaluation(start: Callable[..., tuple[Rollouts, Job]]) -> None:
    rollouts, job = start(1)
    rollouts.inputs.evaluation.prompts.extend(PROMPTS[:4])
    with rollouts:
        rollouts.sync(0)
        job.servers[0].held = True
        rollouts.begin_evaluation(0)
        for ask in (lambda: rollouts.sample(PROMPTS, 1), lambda: rollouts.sync(1), lambda: rollouts.evaluate(0)):
            with pytest.raises(AssertionError, match="is not ended"):
                ask()


def test_an_evaluation_of_other_weights_is_refused(start: Callable[..., tuple[Rollouts, Job]]) -> None:
    rollouts, job = start(1)
    rollouts.inputs.evaluation.prompts.extend(PROMPTS[:4])
    with rollouts:
        rollouts.sync(3)
        job.servers[0].version = "4"
        rollouts.begin_evaluation(3)
        with pytest.raises(SyncError, match=r"the evaluation after step 3: .* versions \['4'\], expected 3"):
            rollouts.end_evaluation(3)
        with pytest.raises(SyncError, match=r"the evaluation after step 3: .* versions \['4'\], expected 3"):
            rollouts.evaluate(3)


def test_an_evaluation_is_dropped_before_its_graders_end(
    start: Callable[..., tuple[Rollouts, Job]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts, job = start(1)
    rollouts.inputs.evaluation.prompts.extend(PROMPTS[:4])
    honest, threads = RewardPool.__exit__, []

    def watched(pool: RewardPool, *exception: Any) -> None:
        threads.extend(thread.name for thread in threading.enumerate())
        honest(pool, *exception)

    monkeypatch.setattr(RewardPool, "__exit__", watched)
    with pytest.raises(ZeroDivisionError), rollouts:
        rollouts.sync(0)
        job.servers[0].held = True
        rollouts.begin_evaluation(0)
        until(lambda: job.servers[0].asked)
        1 / 0  # noqa: B018
    assert threads and "sampling" not in threads


@pytest.mark.parametrize("is_generated", [False, True])
def test_an_evaluation_that_is_interrupted_is_said_to_be_lost(
    start: Callable[..., tuple[Rollouts, Job]],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    is_generated: bool,
) -> None:
    """Also while graders are waited for."""
    rollouts, job = start(1)
    rollouts.inputs.evaluation.prompts.extend(PROMPTS[:4])
    with rollouts:
        rollouts.sync(0)
        job.servers[0].held = not is_generated
        monkeypatch.setattr(rollouts.pool, "submit", lambda *_, **__: Future())
        rollouts.begin_evaluation(0)
        if is_generated:
            until(lambda: len(job.servers[0].answered) == 36)
        rollouts.interrupt()
        with pytest.raises(Interrupted):
            rollouts.end_evaluation(0)
    assert "the evaluation after step 0 is lost: the run was asked to end" in capfd.readouterr().out


HANGS = """
import time

class Hangs:
    name, version = "hangs", "1"
    def __call__(self, request):
        return 1.0
    def explain(self, request):
        time.sleep(3600)
"""


def test_an_evaluation_keeps_grades_that_cannot_be_explained(
    start: Callable[..., tuple[Rollouts, Job]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    monkeypatch.syspath_prepend(str(tmp_path))
    rollouts, _ = start(1, "eval.samples=1", "reward.name=hangs:Hangs", "reward.time_limit_s=0.5")
    rollouts.inputs.evaluation.prompts.extend(PROMPTS[:2])
    with rollouts:
        rollouts.sync(0)
        found = rollouts.evaluate(0)
        assert (found.mean, found.greedy, rollouts.grader_failures) == (1.0, 1.0, {})
    written = read_samples(rollouts._recipe.run.dir)[0]
    assert [(one.reward, one.seen, one.reason) for one in written] == [(1.0, None, "explain: timeout")] * 2
