"""Of a run's report: what its method is called, and what it tells of itself, by what the method declares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_apo.config import ObjectiveConfig
from megatron_apo.objectives import build_objective
from megatron_apo.telemetry.figures import Figure, Rows, named, series, told_figures

_KL = {"kl/per_token", "kl/per_sequence"}
_CRITIC = {"critic/loss", "critic/grad_norm"}
_IMPORTANCE = {"importance/mean", "importance/capped"}
_IN_REINFORCE_UNITS = "grad_norm_reinforce"


@dataclass(frozen=True)
class Method:
    """A run's. title, taken_off: as in the recipe's section. told: the metrics that a step should tell beside those of
    every run. needs_store: whether the run has a V* store; None: unknown."""

    title: str = ""
    taken_off: str | None = None
    told: frozenset[str] = frozenset()
    needs_store: bool | None = None

    @classmethod
    def of(cls, recipe: Mapping[str, Any]) -> Method:
        """Of a resolved recipe; of none, or of one whose method is none of today's, nothing is known."""
        try:
            section: ObjectiveConfig = TypeAdapter(ObjectiveConfig).validate_python(recipe["objective"])
        except (KeyError, ValidationError):
            return cls()
        objective = build_objective(section, max_response_tokens=recipe["sampling"]["max_response_tokens"])
        told = objective.told
        if objective.needs_reference:
            told |= _KL
        if objective.needs_critic:
            told |= _CRITIC
        if objective.reinforce_scale is not None:
            told |= {_IN_REINFORCE_UNITS}
        if recipe["train"].get("importance", "none") != "none":
            told |= _IMPORTANCE
        needs_store = section.needs_store or recipe["vstar"].get("filter", "none") != "none"
        return cls(section.title, section.taken_off, told, needs_store)


def distance(rows: Rows, method: Method) -> str:
    """HTML: of the policy from the reference; nothing where there is none."""
    titles = {
        "kl/per_token": "KL per token, nats",
        "kl/per_sequence": "KL per sequence, nats",
        "kl/in_reward": "KL in the reward, nats a response, before its coefficient",
        "kl/in_loss": "KL in the loss, nats a token, before its coefficient",
    }
    return told_figures(rows, [Figure(title, {"KL": name}) for name, title in titles.items()], method.told)


def targets(rows: Rows, method: Method) -> str:
    """HTML: what the method learns from, and what it leaves out."""
    taken_off = method.taken_off or "baseline"
    figures = [
        Figure(f"advantage r − {taken_off}", named(["advantage/mean", "advantage/second_moment"])),
        Figure(f"{taken_off} beside the reward", {taken_off: "value/mean"}, beside={"reward": "reward/mean"}),
        Figure("responses without a baseline of their own", named(["value/fallbacks"]), percent=True),
        Figure("standard deviation of a group's rewards, mean", named(["group/std"])),
        Figure("responses in groups of equal rewards, which teach nothing", named(["group/equal"]), percent=True),
        Figure("length penalty in the reward, mean", named(["reward/length_penalty"])),
        Figure("ratio to the old policy of a response, mean", named(["ratio/mean"])),
        Figure("tokens that a bound took out of the gradient", named(["clip/low", "clip/high", "clip/dual"]), True),
        Figure("Bellman residual of a response, mean", named(["bellman/residual"])),
        Figure("logit of the first token, mean", named(["bellman/first_logit"])),
    ]
    if any(series(rows, "prompts/not_worth")[1]):  # else a step's prompts are as many as the recipe says
        drawn, learned = {"of all that were drawn": "reward/drawn"}, {"of those that are learned from": "reward/mean"}
        figures += [
            Figure("prompts of a step", named(["prompts/drawn", "prompts/not_worth"])),
            Figure("reward of a step's prompts", drawn, beside=learned),
        ]
    return told_figures(rows, figures, method.told)


def critic(rows: Rows, method: Method) -> str:
    """HTML; nothing where there is none."""
    figures = [
        Figure("share of the returns' variance that the critic explains", named(["critic/explained_variance"])),
        Figure("loss of the critic", named(["critic/loss"])),
        Figure("gradient norm of the critic", named(["critic/grad_norm"])),
        Figure("values that the bound took out of the gradient", named(["critic/clipped"]), percent=True),
        Figure("optimizer steps of the critic that were skipped", named(["critic/skipped_steps"])),
    ]
    return told_figures(rows, figures, method.told)


def importance(rows: Rows, method: Method) -> str:
    """HTML: the weights against the sampler's mismatch; nothing where there are none."""
    return told_figures(rows, [Figure("importance weights", named(sorted(_IMPORTANCE)))], method.told)


def optimization(rows: Rows, method: Method) -> str:
    """HTML."""
    in_units = _IN_REINFORCE_UNITS in method.told
    norm = {"norm": _IN_REINFORCE_UNITS if in_units else "grad_norm"}
    figures = [
        Figure("loss", named(["loss"])),
        Figure("gradient norm in REINFORCE units" if in_units else "gradient norm", norm),
        Figure("entropy per token, nats", named(["entropy/per_token"])),
    ]
    return told_figures(rows, figures, {"loss", *norm.values()})
