"""What evaluations sampled: kept whole, and shown by what was gained, with what the grader saw."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_apo.stages.report_samples import samples_section
from megatron_apo.telemetry.samples import EvaluatedPrompt, read_samples, write_samples


def evaluated(index: int, mean: float, response: str = "7", **changes: str | None) -> EvaluatedPrompt:
    texts = {"finish_reason": "stop", "reference": f"ref{index}", "seen": "seven", "reason": "numbers"} | changes
    return EvaluatedPrompt(f"{index:032x}", "", f"prompt {index}", "answer", mean, response, reward=mean, **texts)


def test_they_are_read_as_they_were_written(tmp_path: Path) -> None:
    found = [evaluated(1, 0.5, "line\n\u2028 <b>é"), evaluated(2, 0.0)]
    write_samples(tmp_path, 0, found)
    write_samples(tmp_path, 1_000_000, found[:1])
    assert read_samples(tmp_path) == {0: found, 1_000_000: found[:1]}
    assert read_samples(tmp_path / "none") == {}


def test_the_report_shows_what_gained_most_and_least(tmp_path: Path) -> None:
    gains = [0.5, -0.25, 1.0, 0.0, 0.25, -0.5, 0.75, 0.1]
    write_samples(tmp_path, 0, [evaluated(index, 0.0, f"before {index}") for index in range(8)])
    after = [evaluated(index, gain, f"after {index}") for index, gain in enumerate(gains)]
    write_samples(tmp_path, 4, after[::-1])
    page = samples_section(tmp_path)
    most, _, least = page.partition("gained least")
    assert "gained most" in most
    assert re.findall(r"<pre>prompt (\d)", most) == ["2", "6", "0"]
    assert re.findall(r"<pre>prompt (\d)", least) == ["3", "1", "5"]
    assert most.index("before 2") < most.index("after 2") and "step 4, greedy" in page


def test_of_one_evaluation_what_scored_most_and_least(tmp_path: Path) -> None:
    write_samples(tmp_path, 0, [evaluated(index, index / 10) for index in range(7)])
    most, _, least = samples_section(tmp_path).partition("scored least")
    assert re.findall(r"<pre>prompt (\d)", most) == ["6", "5", "4"]
    assert re.findall(r"<pre>prompt (\d)", least) == ["2", "1", "0"]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, "the grader saw <code>seven</code> (numbers): reward 0.5; mean of the samples 0.50"),
        ({"seen": "", "reason": "no number"}, "the grader saw no answer (no number)"),
        ({"seen": None, "reason": ""}, "<small>reward 0.5; mean of the samples 0.50"),
        ({"seen": None, "reason": "timeout"}, "<small>reward 0.5 (timeout); mean of the samples 0.50"),
        ({"finish_reason": "length"}, "<b>step 0, greedy, cut at the length cap</b>"),
        ({"response": "<script>&"}, "<pre>&lt;script&gt;&amp;</pre>"),
        ({"response": "x" * 5000}, f"<pre>{'x' * 1200} [...]</pre>"),
        ({"reference": ""}, "reference <code>answer</code>"),
    ],
)
def test_what_is_said_of_a_response(changes: dict[str, str | None], shown: str, tmp_path: Path) -> None:
    write_samples(tmp_path, 0, [evaluated(0, 0.5, **changes)])
    assert shown in samples_section(tmp_path)


def test_a_run_without_an_evaluation(tmp_path: Path) -> None:
    assert "no evaluation in this run's folder yet" in samples_section(tmp_path).replace("&#x27;", "'")
