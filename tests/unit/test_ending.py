"""A run that is asked to end early: who hears of it, what is dropped and what is finished."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from megatron_apo.runtime import launch
from megatron_apo.runtime.deadline import Deadline
from megatron_apo.runtime.ending import EndedEarly, Interrupted, Request
from megatron_apo.runtime.signals import ENDED_EARLY

# A process that is told of the signal while its main thread is where Python handles none.
IN_C = """
import ctypes, os, sys, threading, time
from megatron_apo.runtime.signals import on_ask
{before}
on_ask(lambda: os._exit(75))
print("ready", flush=True)
lock = ctypes.create_string_buffer(64)
[ctypes.CDLL(None).pthread_mutex_lock(lock) for _ in "12"]
"""


class OneRank:
    is_driver, world_size = True, 1

    @staticmethod
    def broadcast(value: object) -> object:
        return value


@pytest.fixture
def request_() -> Request:
    return Request()


@pytest.fixture(autouse=True)
def launchers_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever other tests have left in this process."""
    monkeypatch.setattr(launch, "request", Request())
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


@pytest.fixture
def drops() -> list[float]:
    return []


@pytest.fixture
def deadline(request_: Request, drops: list[float]) -> Iterator[Deadline]:
    with Deadline(OneRank(), lambda: drops.append(time.monotonic()), request_) as made:
        yield made


def test_the_first_who_asks_counts_and_all_hear_it_once(request_: Request) -> None:
    heard: list[str | None] = []
    with request_.heard_by(lambda: heard.append(request_.why)):
        assert request_.why is None and request_.left_s == math.inf
        request_.ask("rank 3", 10)
        request_.ask("rank 5", 1)
    assert heard == ["rank 3"] and 9 < request_.left_s <= 10
    with request_.heard_by(lambda: heard.append("late")):
        assert heard == ["rank 3", "late"]


@pytest.mark.parametrize(
    ("notice_s", "dropped"),
    [(math.inf, False), (0.5, True), (1.9, True), (10.0, False)],  # 1 s of sampling, 0.5 of learning, 0.5 of saving
)
def test_what_is_sampled_is_dropped_where_the_rest_of_the_step_does_not_fit(
    notice_s: float, dropped: bool, request_: Request, deadline: Deadline, drops: list[float]
) -> None:
    deadline.expect(1.5, 1.0, 0.5)
    deadline.require_time()
    with pytest.raises(Interrupted) if dropped else nullcontext(), deadline.sampling():
        request_.ask("SIGUSR1", notice_s)
        assert bool(drops) == dropped
        if drops:  # as the fleet does
            raise Interrupted
    if dropped:
        return
    with deadline.learning():
        pass
    with pytest.raises(Interrupted):
        deadline.require_time()


def test_sampling_that_takes_longer_than_before_is_dropped_in_time(
    request_: Request, deadline: Deadline, drops: list[float]
) -> None:
    deadline.expect(0.2, 0.1, 0.2)
    with pytest.raises(Interrupted), deadline.sampling():
        request_.ask("SIGUSR1", 1.0)
        assert not drops
        asked = time.monotonic()
        while not drops:
            assert time.monotonic() - asked < 5
            time.sleep(0.01)
        time.sleep(0.1)
        assert 0.5 < drops[0] - asked < 0.9


def test_a_step_of_unknown_length_is_dropped(request_: Request, deadline: Deadline, drops: list[float]) -> None:
    with pytest.raises(Interrupted), deadline.sampling():
        request_.ask("SIGUSR1", 1000.0)
        assert drops


def test_a_run_that_nobody_asks_goes_on(deadline: Deadline, drops: list[float]) -> None:
    for _ in range(2):
        deadline.require_time()
        with deadline.sampling():
            pass
        with deadline.learning():
            pass
    assert not deadline.is_asked and not drops


def test_what_was_sampled_is_not_learned_from_without_time_for_it(request_: Request, deadline: Deadline) -> None:
    deadline.expect(1.5, 0.0, 0.5)
    with pytest.raises(Interrupted), deadline.sampling():
        request_.ask("SIGUSR1", 1.0)


@pytest.mark.parametrize("before", ["", "time.sleep(0.5)"])
def test_a_process_hears_of_it_whatever_its_main_thread_does(before: str) -> None:
    """Also of what it was sent before it could."""
    process = subprocess.Popen([sys.executable, "-c", IN_C.format(before=before)], stdout=subprocess.PIPE)
    if before:
        process.kill()
        process.wait()
        process = subprocess.Popen(
            [sys.executable, "-c", IN_C.format(before=before)], stdout=subprocess.PIPE, preexec_fn=launch.block_ask
        )
    else:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == ENDED_EARLY


def test_a_launcher_passes_it_on_to_its_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import os, signal, time; signal.signal(signal.SIGUSR1, lambda *_: os._exit(75));"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1]); os.kill(os.getppid(), signal.SIGUSR1);"
        "time.sleep(60)"
    )

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", code], preexec_fn=launch.block_ask)

    assert launch._supervise([start, start]) == (0, ENDED_EARLY)
    assert launch.request.why is not None
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_work_under_a_guard_ends_at_once(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 1, of which a shard is lost at most."""
    monkeypatch.setattr(
        launch, "_start", lambda arguments, own, log, watch: subprocess.Popen([*watch, "sleep", "60"], env=own)
    )
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    signal.alarm(1)
    with pytest.raises(EndedEarly, match="estimate-vstar ended early, as it was asked to"):
        launch.run_guarded(["estimate-vstar"], os.environ)


def test_a_step_that_is_learned_is_written_down_before_the_run_ends(request_: Request, deadline: Deadline) -> None:
    with deadline.put_off():
        request_.ask("SIGUSR1", 1.0)
        raise Interrupted
    with pytest.raises(Interrupted):
        deadline.require_time()
