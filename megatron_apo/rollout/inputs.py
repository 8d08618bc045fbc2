"""What both stages start from: tokenizer, rendered prompts, stop ids, and fingerprints that tie stores to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_apo.config import Recipe, SamplingConfig, Source, fields_marked, values_marked
from megatron_apo.data.presets import PLAIN, RowFormat, source_format
from megatron_apo.data.procedural import Part
from megatron_apo.data.prompts import LoadedPrompts, Prompt, load_part
from megatron_apo.data.rendering import PromptRenderer
from megatron_apo.model.tokenizer import StopIds, load_tokenizer
from megatron_apo.rewards import GradeRequest, get_reward
from megatron_apo.rollout.client import Sampling
from megatron_apo.values.fingerprint import Fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Inputs:
    """The recipe's data, read once. `evaluation` is empty where the recipe has no held-out prompts."""

    tokenizer: PreTrainedTokenizerBase
    renderer: PromptRenderer
    training: LoadedPrompts
    evaluation: LoadedPrompts
    stop_token_ids: tuple[int, ...]
    stop_note: str | None = None  # what the user should see of them

    def grade_request(self, prompt: Prompt, token_ids: Sequence[int], finish_reason: str) -> GradeRequest:
        """A sample as a grader sees it: the stop id is no part of the text; other special tokens are."""
        if token_ids and token_ids[-1] in self.stop_token_ids:
            token_ids = token_ids[:-1]
        response = self.tokenizer.decode(list(token_ids), skip_special_tokens=False)
        thinks = self.renderer.asks_to_think
        return GradeRequest(prompt.text, response, prompt.answer, finish_reason, thinks, prompt.grader)

    def sampling(self, config: SamplingConfig, *, greedy: bool = False) -> Sampling:
        """The recipe's sampling as a request's parameters; `greedy` keeps its cap and stop ids."""
        return Sampling(
            max_tokens=config.max_response_tokens,
            stop_token_ids=self.stop_token_ids,
            temperature=0.0 if greedy else config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
        )


def load_inputs(recipe: Recipe) -> Inputs:
    """Read tokenizer and prompts. Raises `ValueError` naming the recipe's key for anything that is not as it says."""
    tokenizer = load_tokenizer(recipe.model.path, "model.path")
    renderer = PromptRenderer(tokenizer, recipe.data)
    training, evaluation = load_part(recipe, "train", renderer), load_part(recipe, "eval", renderer)
    stop = StopIds.of(recipe, recipe.model.path, renderer)
    return Inputs(tokenizer, renderer, training, evaluation, stop.ids, stop.note)


def store_fingerprint(recipe: Recipe, inputs: Inputs) -> Fingerprint:
    """Everything that V* under this recipe depends on. Reads the reference's weights once a run, for their hash."""
    hash_memo = recipe.run.dir / "reference_hash.json"
    return _fingerprint(recipe, inputs, recipe.model.reference_path, hash_memo, "train")


def evaluation_fingerprint(recipe: Recipe, inputs: Inputs, hash_memo: Path, *, greedy: bool) -> Fingerprint:
    """Everything that the sampled rewards of an evaluation of `model.path` depend on, or the greedy ones. `hash_memo`
    keeps the hash of its weights."""
    found = _fingerprint(recipe, inputs, recipe.model.path, hash_memo, "eval")
    own = {"purpose": "eval", "seed": recipe.run.seed, "adaptive": None, "samples_per_prompt": recipe.eval.samples}
    return found.model_copy(update=own | ({"samples_per_prompt": 1, "temperature": 0.0} if greedy else {}))


def _fingerprint(recipe: Recipe, inputs: Inputs, model: Path, hash_memo: Path, part: Part) -> Fingerprint:
    from megatron_apo.weights.hf_io import known_model_hash

    names, sources = fields_marked("fingerprint"), [_SourceFacts.of(source) for source in recipe.sources(part)]
    settings = {names[key]: value for key, value in values_marked(recipe, "fingerprint").items()}
    prompts = inputs.training if part == "train" else inputs.evaluation
    if [one.name for one in sources] == [""]:
        format, reward = sources[0].format, sources[0].reward
    else:  # formats and rewards are the sources'
        format, reward = PLAIN, {"reward_name": "", "reward_version": "", "reward_options": {}}
        settings["sources"] = [one.told() for one in sources]
    return Fingerprint(
        model_hash=known_model_hash(model, hash_memo),
        stop_token_ids=list(inputs.stop_token_ids),
        dataset_hash=prompts.dataset_hash,
        **settings | inputs.renderer.of_format(format).fingerprint() | reward,
    )


@dataclass(frozen=True)
class _SourceFacts:
    """Of a source, what the rewards of its samples depend on beside its rows."""

    name: str
    format: RowFormat
    reward: dict[str, Any]

    @classmethod
    def of(cls, source: Source) -> _SourceFacts:
        own, options = get_reward(source.grader.name, source.grader.options), source.grader.options
        named = {"reward_name": own.name, "reward_version": own.version, "reward_options": options}
        return cls(source.name, source_format(source), named)

    def told(self) -> dict[str, Any]:
        return {"name": self.name, "prompt_format": self.format.prompt_format} | self.reward
