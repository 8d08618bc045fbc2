"""How often graders are right, and how fast they are, on labelled pairs of a reference and a response.

    python -m tests.benchmarks.graders [--part open|held_out] [--errors] [--seconds] [--hostile COUNT]

The pairs (`tests/graded`) were written by hand, in the forms of public benchmarks' answers, about half of them wrong
but near; two thirds are there to look at (`open`), the others are only counted (`held_out`). False positives are wrong
responses that are rewarded, false negatives right ones that are not. seconds: of one process that has read each
reference before, and no response. hostile: so many random and crafted pairs, in a
pool as training has it: what became of them, and how much memory the grader's process had.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import psutil

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
    parser.add_argument("--hostile", type=int, help="grade so many random and crafted strings, and nothing else")
    options = parser.parse_args()
    if options.hostile:
        grade_hostile(options.hostile)
        return
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
    """The median of five new processes."""
    code = f"from tests.benchmarks.graders import one_speed; print(one_speed({name!r}, {pairs!r}))"
    command = [sys.executable, "-c", code]
    found = [float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) for _ in range(5)]
    return sorted(found)[2]


def one_speed(name: str, pairs: list[dict]) -> float:
    from megatron_apo.rewards import get_reward

    reward = get_reward(name, {})
    requests = [GradeRequest("", pair["response"], pair["reference"], "stop") for pair in pairs]
    for request in requests:
        with suppress(ValueError):  # a reference that is refused
            reward(GradeRequest("", "#### 0 \\boxed{0}", request.answer, "stop"))
    start = time.perf_counter()
    for request in requests:
        with suppress(ValueError):
            reward(request)
    return len(requests) / (time.perf_counter() - start)


def hostile(count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Random and crafted pairs of a response and a reference: LaTeX in bits, unmatched brackets, towers of powers, long
    digits, odd Unicode; a third against 3, a third against a mutation of themselves, a third of labelled references
    mutated."""
    draw = random.Random(seed)
    bits = [*"0123456789xyzn+-*/^_=<>(),.[]{}|!:;%$&~# ", r"\frac", r"\sqrt", r"\boxed{", r"\text{", "}", r"\{", r"\}"]
    bits += [r"\left(", r"\right)", r"\cup", r"\ldots", r"\begin{cases}", r"\end{cases}", r"\\", r"\pm", r"\in", r"\le"]
    bits += [r"\mathbb{Z}", r"\infty", r"\sum_{i=1}^n", r"\int_0^1", "9^{9^{9", "!!", "1e999999", "\u2212", "\u00b2"]
    bits += ["factorial", " and ", " or ", "hours", "\x00", "\ud7ff", "\U0001d7d8", "a" * 40, "9" * 300, "(" * 60, "½"]
    bits += ["{" * 60, "₅", "①", "٣"]
    known = [pair["reference"] for pair in read_pairs("open", "math")]

    def mutated(text: str) -> str:
        place = draw.randint(0, len(text))
        return text[:place] + draw.choice(bits) + text[place + draw.randint(0, 2) :]

    for number in range(count):
        text = "".join(draw.choices(bits, k=draw.randint(1, 30)))
        if number % 3 == 0:
            yield (text, "3") if draw.random() < 0.5 else ("3", text)
        else:
            text = text if number % 3 == 1 else draw.choice(known)
            yield mutated(text), text


def grade_hostile(count: int) -> None:
    config = RewardConfig(name="math", time_limit_s=5.0, failure_reward=-1.0)
    failures: Counter[str] = Counter()
    with RewardPool(config) as pool:
        texts, start, done = hostile(count), time.perf_counter(), 0
        while some := list(islice(texts, 5000)):
            requests = [GradeRequest("", rf"\boxed{{{response}}}", answer, "stop") for response, answer in some]
            failures.update((one.failure or "graded").partition(" in the reference")[0] for one in pool.grade(requests))
            done += len(some)
            sizes = [child.memory_info().rss >> 20 for child in psutil.Process().children(recursive=True)]
            print(f"{done}, {time.perf_counter() - start:.0f} s: {dict(failures)}; graders' MiB {sizes}", flush=True)


if __name__ == "__main__":
    main()
