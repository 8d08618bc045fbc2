"""`megatron-apo serve` up to where engines are started: what it refuses, how many engines it offers, which GPUs it says
are idle, and how it ends. What starts engines is replaced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from megatron_apo.config import Recipe
from megatron_apo.rollout import node as nodes
from megatron_apo.rollout.node import DriverLost, JoinRefused
from megatron_apo.runtime.job import SECRET
from megatron_apo.runtime.machine import Machine
from megatron_apo.stages import serve as stage
from tests.conftest import InProcess
from tests.runs import write_run


class Engines:
    """In place of `NodeEngines`. made: what each was made with; events: what became of them; error: what the driver's
    answer or silence raises, by when."""

    made: list[dict[str, Any]]
    events: list[str]
    error: dict[str, Exception]

    def __init__(self, recipe: Recipe, address: str, secret: str, **options: Any):
        self.made.append({"address": address, "secret": secret, **options})

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *exception: object) -> None:
        self.events.append("ended")

    def join(self) -> None:
        self._come_to("join")

    def follow(self) -> None:
        self._come_to("follow")

    def _come_to(self, what: str) -> None:
        self.events.append(what)
        if error := self.error.get(what):
            raise error


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> type[Engines]:
    found = type("Engines", (Engines,), {"made": [], "events": [], "error": {}})
    monkeypatch.setattr(stage, "NodeEngines", found)
    return found


Serve = Callable[..., CompletedProcess[str]]


@pytest.fixture
def serve(tmp_path: Path, engines: type[Engines], in_process: InProcess, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """serve(*arguments, gpus=how many are here, secret=...): the command, with a recipe whose engines are dedicated."""
    write_run(tmp_path, "rollout.placement=dedicated", "rollout.driver=10.0.0.1:29600", "parallel.timeout_s=50")
    monkeypatch.setattr(Machine, "here", lambda: Machine())

    def run(*arguments: str, gpus: int = 0, secret: str = "the job's") -> CompletedProcess[str]:
        monkeypatch.setattr(nodes, "engine_gpus", lambda rollout: gpus)
        return in_process("serve", "-r", tmp_path / "recipe.yaml", *arguments, **{SECRET: secret})

    return run


def test_a_machine_offers_its_engines_to_the_driver_until_the_job_is_over(serve: Serve, engines: type[Engines]) -> None:
    found = serve()
    assert (found.returncode, found.stderr) == (0, "") and "the job's" not in found.stdout
    assert engines.made == [{"address": "10.0.0.1:29600", "secret": "the job's", "room": 1, "patience_s": 50}]
    assert engines.events == ["join", "follow", "ended"]
    assert serve("--driver", "10.0.0.2:1").returncode == 0 and engines.made[-1]["address"] == "10.0.0.2:1"


@pytest.mark.parametrize(
    ("gpus", "arguments", "room", "idle"),
    [
        (0, [], 1, ""),
        (0, ["--engines", "3"], 3, ""),
        (8, ["rollout.tp=2"], 4, ""),
        (7, ["rollout.tp=4"], 1, "GPUs 4, 5, 6 of 7 have no engine: 1 of rollout.tp=4"),
        (5, ["rollout.tp=2", "--engines", "1"], 1, "GPUs 2, 3, 4 of 5 have no engine: 1 of rollout.tp=2"),
    ],
)
def test_there_are_as_many_as_gpus_allow_or_as_wanted_and_idle_gpus_are_named(
    gpus: int, arguments: list[str], room: int, idle: str, serve: Serve, engines: type[Engines]
) -> None:
    found = serve(*arguments, gpus=gpus)
    assert (found.returncode, engines.made[0]["room"]) == (0, room)
    assert found.stdout.partition(": ")[2].strip() == idle


@pytest.mark.parametrize(
    ("when", "error", "code"),
    [
        ("join", JoinRefused("the driver at 10.0.0.1:29600 refuses this node"), 1),
        ("join", DriverLost("the driver at 10.0.0.1:29600 has not answered"), 76),
        ("follow", DriverLost("the driver at 10.0.0.1:29600 has been silent"), 76),
    ],
)
def test_a_driver_that_refuses_or_is_lost_is_a_line_and_a_code(
    when: str, error: Exception, code: int, serve: Serve, engines: type[Engines]
) -> None:
    engines.error[when] = error
    found = serve()
    assert (found.returncode, found.stderr) == (code, f"error: {error}\n")
    assert engines.events[-2:] == [when, "ended"]


@pytest.mark.parametrize(
    ("arguments", "secret", "says"),
    [
        (["rollout.placement=colocated", "rollout.driver=null"], "the job's", "rollout.placement: colocated, "),
        ([], "", "MEGATRON_APO_SECRET: not set; "),
        (["--engines", "0"], "the job's", "--engines"),
    ],
)
def test_what_cannot_be_served_is_refused_before(
    arguments: list[str], secret: str, says: str, serve: Serve, engines: type[Engines]
) -> None:
    found = serve(*arguments, secret=secret)
    assert found.returncode == 2 and says in found.stderr and "Traceback" not in found.stderr
    assert not engines.made
