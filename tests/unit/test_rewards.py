"""Graders on the answers people and models write, and the pool on graders that misbehave."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_apo.config import RewardConfig
from megatron_apo.rewards import Explanation, GradeRequest, Reward, get_reward, register_reward, reward_target
from megatron_apo.rewards.pool import Grade, InlineRewardPool, RewardPool
from megatron_apo.rewards.text import thinking_is_unfinished

MISBEHAVING = """
import os, signal, sys, time


class Misbehaving:
    name, version = "misbehaving", "7"

    def __init__(self, scale=1.0):
        self.scale = scale

    def __call__(self, request):
        what = request.response
        if what == "hang":
            time.sleep(3600)
        if what == "hang in C":
            import re
            re.match("(a*)*b", "a" * 60)  # exponential, holds the interpreter lock
        if what == "ignore SIGTERM":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(3600)
        if what == "throw":
            raise KeyError("no such\\nthing")
        if what == "sys.exit":
            sys.exit(3)
        if what == "exit 0":
            os._exit(0)
        if what == "exit 1":
            os._exit(1)
        if what == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if what == "memory":
            return len(bytearray(1 << 31))  # twice the limit
        if what == "recursion":
            return self(request)
        if what == "pid":
            return float(os.getpid())
        if what == "rank":
            return float(bool({"RANK", "WORLD_SIZE", "MEGATRON_APO_SECRET"} & set(os.environ)))
        returns = {"nan": float("nan"), "inf": float("inf"), "text": "1.0", "none": None, "true": True}
        return returns[what] if what in returns else self.scale * float(what)


class Explaining:
    # Its grade takes most of the limit, and what it explains is as its response says.
    name, version = "explaining", "1"

    def __call__(self, request):
        time.sleep(0.6)
        return 1.0

    def explain(self, request):
        from megatron_apo.rewards import Explanation

        what, good = request.response, Explanation(self(request), "1", "one", "numbers")
        if what == "hang":
            time.sleep(3600)
        if what == "die":
            os._exit(1)
        if what == "throw":
            raise KeyError(what)
        class Own(Explanation):
            pass
        returns = {"none": None, "number": Explanation(1.0, "1", 1, ""), "own": Own(1.0, "\\ud800", "one", "mine")}
        return returns.get(what, good)


class Nameless:
    def __call__(self, request):
        return 0.0


class DiesInTheMaking:
    def __init__(self):
        os._exit(1)


class RaisesInTheMaking:
    def __init__(self):
        raise RuntimeError("no licence")
"""


def request(response: str, answer: str = "", finish_reason: str = "stop", prompt: str = "") -> GradeRequest:
    return GradeRequest(prompt, response, answer, finish_reason)


def grade(name: str, response: str, answer: str, finish_reason: str = "stop", prompt: str = "", **options) -> float:
    return get_reward(name, options)(request(response, answer, finish_reason, prompt))


# --- graders


@pytest.mark.parametrize(
    ("prompt", "response", "unfinished"),
    [
        ("1+2=", "<think>a</think>3", False),
        ("1+2=", "3", False),
        ("1+2=", "<think>a", True),
        ("1+2=", "<think>a</think>3<think>b", True),
        ("1+2=", "<think>a</think><think>b</think>3", False),
        ("1+2=<think>\n", "a</think>3", False),
        ("1+2=<think>\n", "a", True),
        ("1+2=<think>\n", "a</think>3<think>b", True),
        ("<think>an example</think>1+2=", "3", False),
        ("1+2=", "a</think>3", False),
    ],
)
def test_thinking_is_unfinished(prompt, response, unfinished):
    assert thinking_is_unfinished(request(response, prompt=prompt)) == unfinished


@pytest.mark.parametrize(
    ("response", "unfinished"),
    [("3", True), ("a</think>3", False), ("<think>a</think>3", False), ("<think>a", True), ("</think><think>3", True)],
)
def test_thinking_that_was_asked_for_must_end(response, unfinished):
    """Where data.thinking is on and the template leaves the opening tag to the model."""
    assert thinking_is_unfinished(replace(request(response), asks_to_think=True)) == unfinished


@pytest.mark.parametrize(
    ("response", "finish_reason", "expected"),
    [
        ("<think>12+34=46;46+56=102</think>102", "stop", 1),
        ("12+34=46;46+56=102</think>102", "stop", 1),  # the template opened the tag
        ("<think>12+34=46;46+56=102</think>102", "length", 0),
        ("<think>12+34=46;46+56=102102", "stop", 0),
        ("102", "stop", 0),
        ("<think></think>103", "stop", 0),
        ("<think></think>1020", "stop", 0),
        ("<think></think>0102", "stop", 0),
        ("<think>102</think>", "stop", 0),
        ("<think></think>7</think>102", "stop", 0),
    ],
)
def test_arithmetic(response, finish_reason, expected):
    assert grade("arithmetic", response, "102", finish_reason) == expected


SOLUTION = "Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### "


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        ("so 9+9 is 18\n#### 18", "18", 1),
        ("#### 18.", "18", 1),
        ("#### 1,800", "1800", 1),
        ("#### 1800", "1,800", 1),
        ("#### $1,234,567.50", "1234567.5", 1),
        ("#### 18.00", "18", 1),
        ("#### -5", "-5", 1),
        ("#### $-5", "-5", 1),
        ("#### 18 dollars", "18", 1),
        ("#### **18**", "18", 1),
        ("#### 18 + 2 = 20", "18", 0),
        ("#### 18 + 2 = 20", "20", 1),
        ("#### 24 - 3 = 21", "21", 1),
        ("#### +3", "3", 1),
        ("#### \u22123", "-3", 1),
        ("#### \u22123", "3", 0),
        ("#### $\u2212$3", "-3", 1),
        ("#### £1,140", "1140", 1),
        ("#### 5-6", "5", 0),
        ("#### 5 - 6", "5", 0),
        ("#### 5\u20136", "5", 0),
        ("#### 5-6", "6", 0),
        ("#### 5:30", "5", 0),
        ("#### 5:30", "30", 0),
        ("#### 5:30", "5:30", 1),
        ("#### 5:03", "5:30", 0),
        ("#### 1/2", "0.5", 1),
        ("#### 3/4", "3/4", 1),
        ("#### 1/4", "3/4", 0),
        ("#### 2 1/4", "2.25", 1),
        ("#### 2 1/4", "2", 0),
        ("#### 5/0", "5", 0),
        ("#### 3 x 6", "3", 0),
        ("#### 3*6", "3", 0),
        ("#### $\\boxed{18}$", "18", 1),
        ("#### __18__", "18", 1),
        ("#### .5", "0.5", 1),
        ("#### -.5", "-0.50", 1),
        ("#### x1 18", "18", 0),
        ("#### the answer is 18", "18", 0),
        ("#### 17\nno, wait\n#### 18", "18", 1),
        ("#### 18\n#### 17", "18", 0),
        ("the answer is 18", "18", 0),
        ("#### 5", "-5", 0),
        ("#### 180", "18", 0),
        ("#### 1", "1800", 0),
        ("#### 18/7", "18", 0),
        ("#### 1,80", "180", 0),
        ("#### 18e3", "18", 0),
        ("#### eighteen", "18", 0),
        ("#### ", "18", 0),
        ("", "18", 0),
    ],
)
def test_gsm8k(response, reference, expected):
    assert grade("gsm8k", response, SOLUTION + reference) == expected
    assert grade("gsm8k", response, reference) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        *(
            (line, 1)
            for line in (
                "18 dollars",
                "18 apples",
                "$18",
                "18%",
                "18.",
                "18 km",
                "18 more",
                "x = 18",
                "18 (eighteen)",
                "**18** dollars per day",
                "9 + 9 = 18",
                "$9 + $9 = $18",
                "18 minutes",
            )
        ),
        *(
            (line, 0)
            for line in (
                "18 + 3",
                "18 or 19",
                "18 million",
                "18k",
                "18½",
                "18\\frac12",
                "18 500",
                "18\\times 2",
                "18π",
                "18 out of 20",
                "18 dollars and 50 cents",
                "x=20, y=18",
            )
        ),
    ],
)
def test_what_may_stand_behind_the_number_of_gsm8k(line, expected):
    """What was counted, and nothing of the number."""
    assert grade("gsm8k", f"#### {line}", SOLUTION + "18") == expected


def test_gsm8k_options():
    assert grade("gsm8k", "it is 17, no: 18.", SOLUTION + "18", strict=False) == 1
    assert grade("gsm8k", "it is 18, no: 17.", SOLUTION + "18", strict=False) == 0
    assert grade("gsm8k", "#### 18", SOLUTION + "18", thinking=True) == 0
    assert grade("gsm8k", "#### 17</think>#### 18", SOLUTION + "18", thinking=True) == 1
    assert grade("gsm8k", "#### 18</think>#### 17", SOLUTION + "18") == 0
    with pytest.raises(ValueError, match="no number after ####"):
        grade("gsm8k", "#### 18", "#### unknown")


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}", 1),
        (r"so \boxed{0.5}", r"\frac12", 1),
        (r"so \boxed{\dfrac{2}{4}}.", "$\\frac{1}{2}$", 1),
        (r"\boxed{2} no, \boxed{3}", "3", 1),
        (r"\boxed{3} no, \boxed{2}", "3", 0),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", 1),
        (r"\boxed{(1, 2)}", "(1,2)", 1),
        (r"\boxed{(2, 1)}", "(1,2)", 0),
        (r"\boxed{1{,}000}", "1000", 1),
        (r"\boxed{3}", r"adding up gives $\boxed{3}$.", 1),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1),
        (r"\boxed{}", "3", 0),
        (r"\boxed{", "3", 0),
        (r"\boxed{} the answer is 3", "3", 0),
        (r"\boxed{ and so 3", "3", 0),
        (r"\boxed{4} the answer is $3$", "3", 0),
        (r"so $\boxed 3$, as asked", "3", 1),
        (r"\fbox{3}", "3", 1),
        ("the answer is 3", "3", 0),
        (r"<think>\boxed{3}</think>the answer is 3", "3", 0),
        (r"<think>\boxed{4}</think>\boxed{3}", "3", 1),
    ],
)
def test_math(response, reference, expected):
    assert grade("math", response, reference) == expected


def test_math_options():
    assert grade("math", "the answer is $3$", "3", boxed=False) == 1
    assert grade("math", "the answer is $4$", "3", boxed=False) == 0
    assert grade("math", r"\boxed{3}", "3", thinking=True) == 0
    assert grade("math", r"thoughts</think>\boxed{3}", "3", thinking=True) == 1
    with pytest.raises(ValueError, match="no answer in the reference"):
        grade("math", r"\boxed{3}", "")


@pytest.mark.parametrize(
    ("name", "solved", "answer"),
    [("arithmetic", "</think>102", "102"), ("gsm8k", "#### 18", "#### 18"), ("math", r"\boxed{3}", "3")],
)
def test_the_prompt_is_not_graded(name, solved, answer):
    assert grade(name, "", answer, prompt=solved) == 0
    assert grade(name, solved, answer, prompt="#### 1 \\boxed{2}") == 1


# --- names


def test_every_registered_reward_has_an_identity():
    for name in ("arithmetic", "gsm8k", "math"):
        reward = get_reward(name, {})
        assert isinstance(reward, Reward) and reward.name == name and reward.version


@pytest.mark.parametrize("value", ["no", 1, None, "false"])
def test_a_switch_of_a_reward_is_true_or_false(value):
    message = re.escape(f"reward.options.strict: {value!r} is not allowed; use true or false")
    with pytest.raises(ValueError, match=f"^{message}$"):
        get_reward("gsm8k", {"strict": value})
    assert get_reward("gsm8k", {"strict": False}).strict is False


def test_names_that_are_no_rewards():
    with pytest.raises(
        ValueError,
        match="reward.name: 'maths' is not a reward; use arithmetic, gsm8k, math, reasoning-gym, or my_m",
    ):
        get_reward("maths", {})
    with pytest.raises(ValueError, match="reward.name: cannot load no_such_module:Thing"):
        get_reward("no_such_module:Thing", {})
    with pytest.raises(ValueError, match="reward.name: cannot load json:Reward"):
        get_reward("json:Reward", {})
    with pytest.raises(ValueError, match="reward.options: {'colour': 1} do not fit"):
        get_reward("math", {"colour": 1})


def test_code_that_fails_is_one_line(misbehaving, tmp_path):
    misbehaving()
    with pytest.raises(ValueError, match=r"^reward.name: misbehaving:RaisesInTheMaking cannot be made \(RuntimeError"):
        get_reward("misbehaving:RaisesInTheMaking", {})
    (tmp_path / "raising.py").write_text("raise KeyError('a licence\\nfor it')")
    with pytest.raises(
        ValueError, match=r"^reward.name: cannot load raising:Thing \(KeyError: .*\); is it importable"
    ) as e:
        get_reward("raising:Thing", {})
    assert "\n" not in str(e.value)


def test_register_reward():
    register_reward("test_twin", "megatron_apo.rewards.arithmetic:ArithmeticReward")
    assert get_reward("test_twin", {}).name == "arithmetic"
    assert reward_target("test_twin") == reward_target("arithmetic")
    with pytest.raises(ValueError, match="'math' is already"):
        register_reward("math", "my_module:Mine")


# --- the pool


@pytest.fixture
def misbehaving(tmp_path, monkeypatch):
    (tmp_path / "misbehaving.py").write_text(MISBEHAVING)
    monkeypatch.syspath_prepend(str(tmp_path))

    def configure(**changes):
        settings = {
            "name": "misbehaving:Misbehaving",
            "time_limit_s": 1.0,
            "memory_limit_gib": 1.0,
            "failure_reward": -9.0,
        }
        return RewardConfig(**(settings | changes))

    return configure


@pytest.mark.parametrize("workers", [1, 2])
def test_the_pool_grades_in_order(workers):
    requests = [request(f"</think>{i % 7}", str(i % 5)) for i in range(300)]
    with RewardPool(RewardConfig(name="arithmetic", workers=workers)) as pool:
        assert pool.grade(requests) == [Grade(float(i % 7 == i % 5)) for i in range(300)]
        futures = [pool.submit(item) for item in requests]
        assert [future.result() for future in futures] == pool.grade(requests)
        assert pool.grade([]) == []
    assert not pool.failures


FAILURES = {
    "hang": "timeout",
    "hang in C": "timeout",
    "ignore SIGTERM": "timeout",
    "exit 0": "died",
    "exit 1": "died",
    "segfault": "died",
    "throw": "error: KeyError: 'no such\\nthing'",
    "sys.exit": "error: SystemExit: 3",
    "memory": "error: MemoryError:",
    "recursion": "error: RecursionError: maximum recursion depth exceeded",
    "nan": "error: returned nan",
    "inf": "error: returned inf",
    "text": "error: returned a str, not a number",
    "none": "error: returned a NoneType, not a number",
}


class TurnedPool(InlineRewardPool):
    """With the same method as the pool that has a thread."""

    def grade(self, requests: list[GradeRequest]) -> list[Grade]:
        grades = [self.submit(item) for item in requests]
        while not all(grade.done() for grade in grades):
            self.poll(wait_s=1.0)
        return [grade.result() for grade in grades]


@pytest.mark.parametrize("kind", [RewardPool, TurnedPool])
def test_exactly_the_guilty_samples_fail_and_are_counted(misbehaving, kind):
    responses = [text for i, what in enumerate(FAILURES) for text in (str(i), what, str(i + 0.5))] + ["true"]
    with kind(misbehaving(options={"scale": 2.0}, time_limit_s=0.5)) as pool:
        grades = dict(zip(responses, pool.grade([request(text) for text in responses]), strict=True))
        assert pool.failures == {"timeout": 3, "died": 3, "error": 8}
        assert pool.grade([request("4")]) == [Grade(8.0)]
    assert grades.pop("true") == Grade(1.0)
    for what, failure in FAILURES.items():
        found = grades.pop(what)
        assert found.reward == -9.0 and found.failure.startswith(failure) and "\n" not in found.failure, (what, found)
    assert grades == {text: Grade(2.0 * float(text)) for text in grades}


UNEXPLAINED = {
    "hang": "explain: timeout",
    "die": "explain: died",
    "throw": "explain: KeyError: 'throw'",
    "none": "explain: returned a NoneType, not an Explanation",
    "number": "explain: returned an Explanation whose answer is no str",
}


def test_what_a_grader_explains_changes_no_grade(misbehaving):
    requests = [request(what) for what in ("good", *UNEXPLAINED, "own")]
    with RewardPool(misbehaving(name="misbehaving:Explaining", workers=4)) as pool:
        grades = pool.grade(requests)
        assert grades == [Grade(1.0)] * len(requests)
        good, *failed, own = pool.explain(requests, grades)
        assert not pool.failures
        assert pool.explain([request("good")], [Grade(-9.0, "timeout")]) == [Grade(-9.0, "timeout")]
    assert good == Grade(1.0, explanation=Explanation(1.0, "1", "one", "numbers"))
    assert failed == [Grade(1.0, unexplained=why) for why in UNEXPLAINED.values()]
    assert own == Grade(1.0, explanation=Explanation(1.0, "?", "one", "mine"))


def test_a_reward_that_explains_nothing(misbehaving):
    with RewardPool(misbehaving()) as pool:
        assert pool.explain([request("1")], [Grade(1.0)]) == [Grade(1.0)]


def test_a_pool_turned_late_fails_nobody_for_it(misbehaving):
    """Its caller was at something else for longer than the limit of one sample."""
    with TurnedPool(misbehaving(time_limit_s=0.5)) as pool:
        pool.grade([request("1")] * 40)  # so that the next batch has several
        grades = [pool.submit(request(str(i))) for i in range(30)]
        for _ in range(3):
            pool.poll()
            time.sleep(0.7)
        pool.poll(wait_s=1.0)
        assert [grade.result(timeout=0) for grade in grades] == [Grade(float(i)) for i in range(30)]
        assert not pool.failures
        hangs = pool.submit(request("hang"))
        pool.poll()
        time.sleep(0.7)
        pool.poll()
        assert hangs.result(timeout=0) == Grade(-9.0, "timeout")
        awaited = pool.submit(request("5"))
    with pytest.raises(RuntimeError, match="closed"):
        awaited.result(timeout=0)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(request("6"))


def test_a_hang_costs_its_limit_once(misbehaving):
    """Its neighbours in the batch are neither failed nor made to wait for more than the one kill."""
    with RewardPool(misbehaving(workers=2, time_limit_s=1.0)) as pool:
        started = time.monotonic()
        grades = pool.grade([request("hang" if i == 20 else str(i)) for i in range(64)])
        assert 1.0 <= time.monotonic() - started < 10.0
    assert [i for i, found in enumerate(grades) if found.failure] == [20]


def test_a_grader_is_no_rank_and_does_not_know_the_jobs_secret(misbehaving, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MEGATRON_APO_SECRET"):
        monkeypatch.setenv(name, "1")
    with RewardPool(misbehaving()) as pool:
        assert pool.grade([request("rank")]) == [Grade(0.0)]


def test_a_worker_killed_between_batches_fails_no_sample(misbehaving):
    with RewardPool(misbehaving()) as pool:
        for _ in range(5):
            (found,) = pool.grade([request("pid")])
            assert found.failure is None
            os.kill(int(found.reward), signal.SIGKILL)
        assert pool.grade([request("3")]) == [Grade(3.0)]
        assert not pool.failures


def test_workers_stay_light_and_end_with_the_pool(misbehaving, tmp_path):
    (tmp_path / "light.py").write_text(
        textwrap.dedent("""
        import signal, sys
        class Light:
            name, version = "light", "1"
            def __call__(self, request):
                assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
                return sum(name in sys.modules for name in ("torch", "vllm", "megatron", "transformers", "numpy"))
        """)
    )
    with RewardPool(misbehaving(name="light:Light")) as pool:
        assert pool.grade([request("")]) == [Grade(0.0)]
    with RewardPool(misbehaving()) as pool:
        pid = int(pool.grade([request("pid")])[0].reward)
        os.kill(pid, signal.SIGINT)
        assert pool.grade([request("pid")])[0].reward == pid
        awaited = pool.submit(request("hang"))
    with pytest.raises(RuntimeError, match="closed"):
        awaited.result(timeout=5)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(request("1"))
    pool.close()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "no_such"}, "reward.name: 'no_such' is not a reward"),
        ({"name": "no_such_module:Thing"}, "reward.name: cannot load no_such_module:Thing"),
        ({"options": {"colour": 1}}, "reward.options: {'colour': 1} do not fit misbehaving:Misbehaving"),
        ({"name": "misbehaving:Nameless"}, "misbehaving:Nameless does not make a reward"),
        ({"name": "misbehaving:DiesInTheMaking"}, "the grader process died while it started"),
        ({"name": "misbehaving:RaisesInTheMaking"}, r"RaisesInTheMaking cannot be made \(RuntimeError: no licence\)"),
    ],
)
def test_a_reward_that_cannot_be_built_stops_the_pool(misbehaving, changes, message):
    with pytest.raises(ValueError, match=message):
        RewardPool(misbehaving(**changes))


def test_math_verify_leaves_the_limit_to_the_pool():
    """9^9^9^9 keeps math-verify busy for ever; an alarm of math-verify's own would hide that behind a plain 0."""
    with RewardPool(RewardConfig(name="math", options={"boxed": False}, time_limit_s=2.0)) as pool:
        answers = pool.grade(
            [request(r"\boxed{3}", "3"), request(r"\boxed{9^{9^{9^{9}}}}", "3"), request(r"\boxed{4}", "3")]
        )
    assert answers == [Grade(1.0), Grade(0.0, "timeout"), Grade(0.0)]


PARENT = """
import sys, time
from megatron_apo.config import RewardConfig
from megatron_apo.rewards import GradeRequest
from megatron_apo.rewards.pool import RewardPool
pool = RewardPool(RewardConfig(name="misbehaving:Misbehaving", workers=2, time_limit_s=600))
hangs = [pool.submit(GradeRequest("", "hang in C", "", "stop"))]
print(int(pool.submit(GradeRequest("", "pid", "", "stop")).result().reward), flush=True)
{ending}
"""


@pytest.mark.parametrize(
    ("ending", "kill"),
    [
        ("time.sleep(600)", signal.SIGKILL),
        ("time.sleep(600)", signal.SIGINT),
        ("raise SystemExit(0)", None),
    ],
    ids=["killed -9", "interrupted", "exits without closing"],
)
def test_no_worker_outlives_its_parent(misbehaving, tmp_path, ending, kill):
    """One worker waits, the other is stuck in C code that never comes back."""
    # Without a main guard, on purpose: workers must not run the user's script again.
    script = tmp_path / "train.py"
    script.write_text(PARENT.format(ending=ending))
    path = os.pathsep.join([str(tmp_path), *sys.path])
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert parent.stdout is not None
    parent.stdout.readline()
    workers = children(parent.pid)
    if kill is not None:
        assert len(workers) == 2
        parent.send_signal(kill)
    parent.communicate(timeout=30)
    limit = time.monotonic() + 10
    while alive := [pid for pid in workers if is_alive(pid)]:
        assert time.monotonic() < limit, f"workers {alive} are still there"
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    try:
        return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]
    except OSError:
        return []


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_pool_cost():
    """256 arithmetic samples: about 9 ms of wall and CPU on an idle machine; the wall's limit allows for a busy one."""
    requests = [request("<think>12+34=46;46+56=102</think>102", "102")] * 256
    with RewardPool(RewardConfig(name="arithmetic")) as pool:
        seconds, cpu_seconds = [], []
        for _ in range(10):
            wall, cpu = time.perf_counter(), time.process_time()
            pool.grade(requests)
            seconds.append(time.perf_counter() - wall)
            cpu_seconds.append(time.process_time() - cpu)
    assert min(cpu_seconds) < 0.04 and min(seconds) < 0.4, (seconds, cpu_seconds)


def test_the_slow_first_grade_of_math_is_over_before_a_sample_is_timed():
    code = (
        "import sys; from megatron_apo.rewards import get_reward\n"
        "assert 'sympy' not in sys.modules\n"
        "get_reward('math', {'thinking': True})\n"
        "assert 'latex2sympy2_extended' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
