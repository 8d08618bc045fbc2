"""What ties a V* store to the model, template, sampling, reward and data it was made with."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from megatron_apo.config import fields_marked

SCHEMA_VERSION = 2


def _set_by() -> dict[str, str]:
    """Where a run sets each field of a fingerprint: the fix that is named when two differ."""
    found = {name: [key] for key, name in fields_marked("fingerprint").items()}
    for key, names in fields_marked("behind_fingerprint").items():
        for name in names:
            found.setdefault(name, []).append(key)
    by_program = {
        "schema_version": "the version of this program",
        "reward_version": "the installed version of the reward",
    }
    return by_program | {name: ", ".join(keys) for name, keys in found.items()}


_SET_BY = _set_by()


class StoreError(ValueError):
    """A V* store that cannot be trusted or does not fit the run, one line for each reason."""


class Fingerprint(BaseModel):
    """Everything that the rewards of a store depend on, but for the limits of graders, whose failures are counted."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    schema_version: int = SCHEMA_VERSION
    model_hash: str
    tokenizer_hash: str
    template_hash: str
    template: str
    thinking: str
    temperature: float
    top_p: float
    top_k: int
    max_response_tokens: int
    stop_token_ids: list[int]
    reward_name: str
    reward_version: str
    reward_options: dict[str, Any]
    failure_reward: float
    truncated: str
    dataset_hash: str
    max_prompt_tokens: int
    samples_per_prompt: int
    adaptive: dict[str, Any] | None = None  # of `AdaptiveConfig`
    seed: int

    @property
    def sample_counts(self) -> range:
        """How many samples a prompt may have."""
        return range(self.samples_per_prompt, (self.adaptive or {}).get("most", self.samples_per_prompt) + 1)

    def differences(self, other: Fingerprint) -> list[str]:
        """One line for each field in which `other`, a run's fingerprint, departs from this one, the store's."""
        return [
            f"{name}: store has {mine!r}, this run has {theirs!r}; set by {_SET_BY[name]}"
            for name in type(self).model_fields
            if (mine := getattr(self, name)) != (theirs := getattr(other, name))
        ]
