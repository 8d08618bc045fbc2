"""A sampled and graded response, as it travels from the rollout engine to the loss."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rollout:
    """One sampled response. `response_ids` ends with the stop id if the response ended with one."""

    prompt_id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    log_probs: tuple[float, ...]  # of the response, as the sampler computed them
    finish_reason: str  # "stop" | "length"
    weight_version: int
    reward: float
    seconds: float = field(compare=False)  # from the batch's requests to this response

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)
