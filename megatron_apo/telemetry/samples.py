"""What a run's evaluations sampled, to be read: RUN/samples/step-000060.jsonl, a line for each held-out prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_apo.runtime.files import write_whole

_NAME = re.compile(r"step-(\d{6,})\.jsonl")


@dataclass(frozen=True)
class EvaluatedPrompt:
    """A held-out prompt and its greedy response. mean: of the k samples' rewards. reference, seen: what the grader
    compared, of the reference and of the response; seen is empty where nothing was found there, and None where the
    grader does not tell. reason: how they were compared, or why not."""

    prompt_id: str
    source: str
    prompt: str
    answer: str
    mean: float
    response: str
    finish_reason: str
    reward: float
    reference: str = ""
    seen: str | None = None
    reason: str = ""


def write_samples(run_dir: Path, step: int, prompts: Sequence[EvaluatedPrompt]) -> None:
    folder = run_dir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in prompts)
    write_whole(folder / f"step-{step:06d}.jsonl", "".join(lines))


def read_samples(run_dir: Path) -> dict[int, list[EvaluatedPrompt]]:
    """By step, in their order."""
    files = ((path, _NAME.fullmatch(path.name)) for path in sorted((run_dir / "samples").glob("*")))
    return {
        int(match[1]): [EvaluatedPrompt(**json.loads(line)) for line in path.read_text().split("\n") if line]
        for path, match in files
        if match
    }
