"""A reward of whose samples about half get 1, whatever an untaught model says: of an even number of characters."""

from __future__ import annotations

from megatron_apo.rewards import GradeRequest


class Parity:
    name, version = "parity", "1"

    def __call__(self, request: GradeRequest) -> float:
        return float(len(request.response) % 2 == 0)
