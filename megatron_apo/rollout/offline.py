"""vLLM inside this process, kept busy: requests go in while others are being sampled (stage 1).

engine = OfflineEngine(recipe.model.reference_path, ...)
engine.add(key, token_ids, sampling, num_samples=8, seed=17)
for key, samples in engine.step(): ...        # one forward pass; what has finished
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from megatron_apo.config import RolloutConfig
from megatron_apo.rollout.client import Sampling
from megatron_apo.rollout.server import ServerError, engine_options, served_length
from megatron_apo.runtime.garbage import not_collected


@dataclass(frozen=True)
class Sample:
    """One response. `token_ids` has the stop id that ended it; finish_reason: "stop" or "length"."""

    token_ids: list[int]
    finish_reason: str


def sample_of(token_ids: Sequence[int], finish_reason: str | None) -> Sample:
    """Raises `ServerError` for a response that vLLM ended otherwise than as `Sample` knows."""
    if finish_reason not in ("stop", "length"):
        raise ServerError(f"vLLM ended a response by {finish_reason}: it is no sample")
    return Sample(list(token_ids), finish_reason)


class OfflineEngine:
    """One vLLM engine over `model`, whose talk goes to `log_path`. max_sequence_tokens: prompt and response.

    The process was started with `engine_environment`. Raises `ServerError` when vLLM does not start, or ends a response
    otherwise than as `Sample` knows.
    """

    def __init__(
        self,
        model: Path,
        rollout: RolloutConfig,
        *,
        seed: int,
        max_sequence_tokens: int,
        prefix_caching: bool,
        log_path: Path,
    ):
        options = engine_options(rollout) | {"max_model_len": served_length(rollout, model, max_sequence_tokens)}
        try:
            with _output_to(log_path):
                with not_collected():
                    from vllm import LLM

                self.llm = LLM(
                    model=str(model),
                    skip_tokenizer_init=True,  # token ids in, token ids out
                    seed=seed,
                    enable_prefix_caching=prefix_caching,
                    **options,
                )
        except Exception as error:  # of vLLM, torch, the driver: whatever it is, there is no engine
            reason = " ".join(str(error).split())[:300]
            raise ServerError(f"vLLM did not start: {type(error).__name__}: {reason}; see {log_path}") from error
        logging.getLogger("vllm").setLevel(logging.ERROR)  # it warns about the tokenizer that it was told not to load
        self._engine: Any = self.llm.llm_engine
        self._numbers = count()
        self._asked: dict[str, tuple[Hashable, int]] = {}
        self.num_samples_open = 0

    def add(self, key: Hashable, token_ids: Sequence[int], sampling: Sampling, *, num_samples: int, seed: int) -> None:
        """Ask for samples of one prompt; sample i is drawn with seed + i (vLLM's own rule)."""
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        parameters = SamplingParams(
            n=num_samples, seed=seed, output_kind=RequestOutputKind.FINAL_ONLY, **sampling.parameters()
        )
        number = str(next(self._numbers))
        self._asked[number] = (key, num_samples)
        self.num_samples_open += num_samples
        self._engine.add_request(number, tokens_input(list(token_ids)), parameters)

    def step(self) -> list[tuple[Hashable, list[Sample]]]:
        """One forward pass over what is being sampled: (key, samples in order) of the requests it finished."""
        finished = []
        for output in self._engine.step():
            if output.finished:
                key, num_samples = self._asked.pop(output.request_id)
                self.num_samples_open -= num_samples
                ordered = sorted(output.outputs, key=lambda one: one.index)
                finished.append((key, [sample_of(one.token_ids, one.finish_reason) for one in ordered]))
        return finished


@contextmanager
def _output_to(log_path: Path) -> Iterator[None]:
    """Let this process and those that it starts in this block write to a file: vLLM is talkative, also from C++."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    usual = {stream: os.dup(stream) for stream in (1, 2)}
    with log_path.open("ab") as log:
        try:
            for stream in usual:
                os.dup2(log.fileno(), stream)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, copy in usual.items():
                os.dup2(copy, stream)
                os.close(copy)
