"""What ties a store to the model, template, sampling, reward and data it was made with.

Most stores are V*'s. Those of an evaluation hold the samples of held-out prompts in the same files.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from megatron_apo.config import fields_marked

SCHEMA_VERSION = 3
Purpose = Literal["vstar", "eval"]


class Words(NamedTuple):
    """How errors speak of a store of one purpose. name: what it is. elsewhere: how to have another beside it."""

    name: str
    elsewhere: str
    prompts_per_shard: str


WORDS: dict[Purpose, Words] = {
    "vstar": Words("V* store", "use another vstar.dir", "vstar.prompts_per_shard"),
    "eval": Words("evaluation", "use another run.dir", "eval.prompts_per_shard"),
}


def _set_by() -> dict[str, str]:
    """Where a run sets each field of a V* store's fingerprint: the fix that is named when two differ."""
    found = {name: [key] for key, name in fields_marked("fingerprint").items()}
    for key, names in fields_marked("behind_fingerprint").items():
        for name in names:
            found.setdefault(name, []).append(key)
    by_program = {
        "schema_version": "the version of this program",
        "reward_version": "the installed version of the reward",
        "purpose": "the command that fills it",
    }
    return by_program | {name: ", ".join(keys) for name, keys in found.items()}


_SET_BY: dict[Purpose, dict[str, str]] = {"vstar": _set_by()}
_SET_BY["eval"] = _SET_BY["vstar"] | {
    "model_hash": "--model, model.path",
    "tokenizer_hash": "--model, model.path",
    "dataset_hash": _SET_BY["vstar"]["dataset_hash"]
    .replace("data.train", "data.eval")
    .replace("data.max_prompts", "eval.max_prompts"),
    "samples_per_prompt": "eval.samples",
    "seed": "run.seed",
}


class StoreError(ValueError):
    """A store that cannot be trusted or does not fit the run, one line for each reason."""


class Fingerprint(BaseModel):
    """Everything that the rewards of a store depend on, but for the limits of graders, whose failures are counted.

    purpose: as in the seeds of its samples (`sample_seed`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    schema_version: int = SCHEMA_VERSION
    purpose: Purpose = "vstar"
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
    sources: list[dict[str, Any]] | None = None  # of several: name, reward and prompt_format of each
    seed: int

    @property
    def words(self) -> Words:
        return WORDS[self.purpose]

    @property
    def masks(self) -> bool:
        """Whether samples that were cut at the length cap have no reward: NaN. An evaluation grades every one."""
        return self.truncated == "mask" and self.purpose == "vstar"

    @property
    def sample_counts(self) -> range:
        """How many samples a prompt may have."""
        return range(self.samples_per_prompt, (self.adaptive or {}).get("most", self.samples_per_prompt) + 1)

    def differences(self, other: Fingerprint) -> list[str]:
        """One line for each field in which `other`, a run's fingerprint, departs from this one, the store's."""
        return [
            f"{name}: store has {mine!r}, this run has {theirs!r}; set by {_SET_BY[self.purpose][name]}"
            for name in type(self).model_fields
            if (mine := getattr(self, name)) != (theirs := getattr(other, name))
        ]
