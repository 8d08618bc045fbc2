"""How often graders are right, and how fast they are, on labelled pairs of a reference and a response.

    python -m tests.benchmarks.graders [--part open|held_out] [--errors] [--seconds]

The pairs (`tests/graded`) were written by hand, in the forms of public benchmarks' answers, about half of them wrong
but near; two thirds are there to look at (`open`), the others are only counted (`held_out`). False positives are wrong
responses that are rewarded, false negatives right ones that are not.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatron_apo.config import RewardConfig
from megatron_apo.rewards import GradeRequest
from megatron_apo.rewards.pool import RewardPool

PAIRS = Path(__file__).parents[1] / "graded"
REWARDS = {"math": "math", "gsm8k": "gsm8k"}  # file -> reward


def read_pairs(part: str, name: str) -> list[dict]:
    return [json.loads(line) for line in (PAIRS / part / f"{name}.jsonl").read_text().splitlines()]


def by_reward(name: str, pairs: list[dict]) -> list[bool | None]:
    """None: it could not be graded."""
    with RewardPool(RewardConfig(name=name, time_limit_s=10.0, failure_reward=-1.0)) as pool:
        grades = pool.grade([GradeRequest("", pair["response"], pair["reference"], "stop") for pair in pairs])
    return [None if grade.failure else grade.reward == 1 for grade in grades]


def by_math_verify(pairs: list[dict]) -> list[bool | None]:
    """As its README uses it; the reference in a box."""
    from math_verify import parse, verify

    logging.disable(logging.WARNING)
    return [bool(verify(parse(f"\\boxed{{{pair['reference']}}}"), parse(pair["response"]))) for pair in pairs]


def count(found: list[bool | None], pairs: list[dict]) -> str:
    counts = Counter(
        "failed" if one is None else "false positives" if one else "false negatives"
        for one, pair in zip(found, pairs, strict=True)
        if one != pair["right"]
    )
    kinds = Counter(pair["kind"] for one, pair in zip(found, pairs, strict=True) if one != pair["right"])
    told = ", ".join(f"{counts[name]} {name}" for name in ("false positives", "false negatives", "failed"))
    return (
        f"{told} of {len(pairs)} ({sum(pair['right'] for pair in pairs)} right); by kind: {dict(kinds.most_common())}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=("open", "held_out"), default="open")
    parser.add_argument("--errors", action="store_true", help="show what is graded wrongly")
    parser.add_argument("--seconds", action="store_true", help="how many responses a second, the median of five")
    options = parser.parse_args()
    for name, reward in REWARDS.items():
        pairs = read_pairs(options.part, name)
        graders: dict[str, Callable[[list[dict]], list[bool | None]]]
        graders = {f"reward {reward}": lambda pairs, reward=reward: by_reward(reward, pairs)}  # type: ignore[misc]
        if name == "math":
            graders["math-verify alone"] = by_math_verify
        for label, grade in graders.items():
            found = grade(pairs)
            print(f"{label}, {options.part}: {count(found, pairs)}")
            if options.errors and label.startswith("reward"):
                for one, pair in zip(found, pairs, strict=True):
                    if one != pair["right"]:
                        print(f"  {one}: {json.dumps(pair)}")
        if options.seconds:
            print(f"reward {reward}: {speed(reward, pairs):.0f} responses a second")


def speed(name: str, pairs: list[dict]) -> float:
    """Of one process that has seen each reference once."""
    from megatron_apo.rewards import get_reward

    reward, took = get_reward(name, {}), []
    requests = [GradeRequest("", pair["response"], pair["reference"], "stop") for pair in pairs]
    for _ in range(6):
        start = time.perf_counter()
        for request in requests:
            with suppress(ValueError):  # a reference that is refused
                reward(request)
        took.append(time.perf_counter() - start)
    return len(requests) / sorted(took[1:])[2]


if __name__ == "__main__":
    main()
