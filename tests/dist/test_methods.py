"""Each method's steps are those of transformers and torch alone, by the formula of its paper.

Real ranks run the learner on a batch of two minibatches (methods_worker.py); here the same two steps are written out on
one model, sequence by sequence, with nothing of `megatron_apo.objectives`. Each fault that is put into the learner from
outside must be seen. What a step computed is what the method says that it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.dist.methods_worker import (
    ADDED,
    CAP,
    CRITIC_LR,
    FAULTS,
    GROUP,
    LR,
    METHODS,
    NUM_MINIBATCHES,
    RESPONSE_LENGTHS,
    REWARDS,
    VALUES,
    VARIANT,
    batch,
    faults_of,
    masked_of,
    objective_of,
    recipe_of,
    temperature_of,
)
from tests.dist.ranks import start_ranks
from tests.dist.test_learner import worst
from tests.models import make_model
from tests.unit.test_methods import DOCS, PAGES

LAYOUTS = {"tp2-pp2": ["ppo", "tbrm", "rebel"], "dp2": list(METHODS)}
FULL = {"cp2": list(METHODS), "tp2-pp2-dp2": ["ppo", "rebel", "dapo"]}
CASES = [(layout, method) for layout, methods in LAYOUTS.items() for method in methods]
FULL_CASES = [
    pytest.param(layout, method, marks=pytest.mark.full) for layout, methods in FULL.items() for method in methods
]
# Of the largest tensor, in the 2-norm. In some the gradients of RLOO's two responses, whose advantages are opposite,
# cancel for the most part: 1.1e-5 was seen there, elsewhere 6e-6.
GRADIENTS = 2e-5
KL = ("kl/in_loss", "kl/in_reward")
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    for seed, name in enumerate(("policy", "reference")):
        make_model(VARIANT, folder / name, seed=seed)
    critic = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "policy" / VARIANT, num_labels=1)
    torch.manual_seed(3)
    torch.nn.init.normal_(critic.score.weight, std=0.02)
    critic.save_pretrained(folder / "critic")
    return folder


@pytest.fixture(scope="module")
def measured(work: Path) -> Callable[[str, str], dict]:
    @cache
    def of(layout: str) -> dict:
        start_ranks("tests.dist.methods_worker", work, layout, *(LAYOUTS | FULL)[layout])
        return torch.load(work / f"{layout}.pt", weights_only=True)

    return lambda layout, method: of(layout)[method]


class Plain:
    """Policy, reference and critic by transformers. rows: those that are learned from."""

    def __init__(self, work: Path, temperature: float, masked: Collection[int]):
        self.temperature = temperature
        self.rows = [row for row in range(len(REWARDS)) if row not in masked]
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.policy, self.reference = (load(work / name / VARIANT, dtype=torch.float32) for name in NAMES)
        self.critic = transformers.AutoModelForSequenceClassification.from_pretrained(
            work / "critic", dtype=torch.float32
        )

    def logits(self, model: torch.nn.Module, row: int) -> tuple[Tensor, Tensor]:
        """([T, V] raw logits that a response's tokens were drawn from, [T] the tokens)."""
        tokens, response = (torch.tensor(of(row)).long() for of in (batch().sequences.row, batch().sequences.response))
        return model(tokens[None]).logits[0, len(tokens) - len(response) - 1 : -1], response

    def log_probs(self, model: torch.nn.Module, row: int) -> Tensor:
        logits_TV, response_T = self.logits(model, row)
        return (logits_TV / self.temperature).log_softmax(-1).gather(1, response_T[:, None])[:, 0]

    def values(self, row: int) -> Tensor:
        tokens, count = torch.tensor(batch().sequences.row(row)).long(), RESPONSE_LENGTHS[row]
        hidden_SH = self.critic.model(tokens[None]).last_hidden_state[0]
        return (hidden_SH @ self.critic.score.weight[0])[-count - 1 : -1]

    def group_of(self, row: int) -> list[int]:
        return [other for other in self.rows if other // GROUP == row // GROUP]


NAMES = ("policy", "reference")


def setting(method: str, key: str, default: Any) -> Any:
    """What the test sets, else `default`: the paper's."""
    found = [text.partition("=")[2] for text in METHODS[method] if text.startswith(f"{key}=")]
    return type(default)(found[0]) if found else default


def group_advantages(method: str, models: Plain) -> dict[int, float]:
    """Of GRPO and its variants."""
    rewards = list(REWARDS)
    if method == "dapo":  # a buffer of 10 tokens before the cap of 30
        rewards = [r - min(max(n - (CAP - 10), 0) / 10, 1) for r, n in zip(REWARDS, RESPONSE_LENGTHS, strict=True)]
    found = {}
    for row in models.rows:
        own = torch.tensor([rewards[member] for member in models.group_of(row)], dtype=torch.float64)
        advantage, std = rewards[row] - float(own.mean()), float(own.std()) if len(own) > 1 else 0.0
        found[row] = advantage if method == "dr_grpo" else advantage / (std + 1e-6)
    return found


def clipped(method: str, ratio_T: Tensor, advantage_T: Tensor) -> Tensor:
    """Minus PPO's objective of each token."""
    low, high = setting(method, "clip_low", 0.2), setting(method, "clip_high", 0.2)
    found = torch.minimum(ratio_T * advantage_T, ratio_T.clamp(1 - low, 1 + high) * advantage_T)
    if dual := setting(method, "dual_clip", 0.0):
        found = torch.where(advantage_T < 0, torch.maximum(found, dual * advantage_T), found)
    return -found


def advantages_and_returns(
    old: list[Tensor], reference: list[Tensor], values: list[Tensor], rows: list[int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """PPO's of each of these rows, token by token; advantages whitened over all their tokens."""
    coefficient, gamma, lam = (setting("ppo", key, 1.0) for key in ("kl_coefficient", "gamma", "lam"))
    found = {}
    for row in rows:
        reward_T = -coefficient * (old[row] - reference[row]).double()
        reward_T[-1] += REWARDS[row]
        value_T, after, advantage_T = values[row].double(), 0.0, torch.zeros(len(reward_T), dtype=torch.float64)
        for t in reversed(range(len(reward_T))):
            next_value = float(value_T[t + 1]) if t + 1 < len(value_T) else 0.0
            after = float(reward_T[t]) + gamma * next_value - float(value_T[t]) + gamma * lam * after
            advantage_T[t] = after
        found[row] = (advantage_T, advantage_T + value_T)
    together = torch.cat([advantage_T for advantage_T, _ in found.values()])
    mean, std = together.mean(), together.std(correction=0)
    return {row: ((advantage_T - mean) / std, return_T) for row, (advantage_T, return_T) in found.items()}


def plain_steps(work: Path, method: str, masked: Collection[int] = ()) -> dict[str, Any]:
    """Gradients of both minibatches, of the policy and of the critic."""
    models, size = Plain(work, temperature_of(method), masked), len(REWARDS) // NUM_MINIBATCHES
    policy = models.policy
    with torch.no_grad():
        reference = [models.log_probs(models.reference, row) for row in range(len(REWARDS))]
        old = [models.log_probs(policy, row) for row in range(len(REWARDS))]
        values = [models.values(row) for row in range(len(REWARDS))]
    targets = advantages_and_returns(old, reference, values, models.rows) if method == "ppo" else {}
    adams = [
        torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), eps=1.0, weight_decay=0.0)
        for model, lr in ((policy, LR), (models.critic, CRITIC_LR))
    ]
    found: dict[str, Any] = {"policy": [], "critic": []}
    for first in range(0, len(REWARDS), size):
        rows = [row for row in models.rows if first <= row < first + size]
        now = {row: models.log_probs(policy, row) for row in rows}
        loss = LOSSES[method](method, rows, now, old, reference, targets, models)
        steps = [("policy", policy, adams[0], loss)]
        if method == "ppo":
            steps.append(("critic", models.critic, adams[1], value_loss(rows, values, targets, models)))
        for name, model, adam, total in steps:
            adam.zero_grad()
            total.backward()
            found[name].append({key: one.grad.clone() for key, one in model.named_parameters()})
            adam.step()
    return found


def value_loss(
    rows: list[int], values: list[Tensor], targets: dict[int, tuple[Tensor, Tensor]], models: Plain
) -> Tensor:
    bound, terms = setting("ppo", "value_clip", 0.2), []
    for row in rows:
        value_T, return_T = models.values(row), targets[row][1].float()
        near_T = values[row] + (value_T - values[row]).clamp(-bound, bound)
        terms.append(torch.maximum((value_T - return_T) ** 2, (near_T - return_T) ** 2) / 2)
    return torch.cat(terms).mean()


def apo(method, rows, now, old, reference, targets, models) -> Tensor:
    beta2 = setting(method, "beta2", 1e-3)
    errors = [beta2 * (now[r].sum() - reference[r].sum()) - (REWARDS[r] - VALUES[r]) for r in rows]
    return torch.stack(errors).square().mean()


def grpo(method, rows, now, old, reference, targets, models) -> Tensor:
    advantage, coefficient = group_advantages(method, models), setting(method, "kl_coefficient", 0.0)
    losses = []
    for row in rows:
        loss_T = clipped(method, (now[row] - old[row]).exp(), torch.full_like(now[row], advantage[row]))
        if coefficient:
            ratio_T = (reference[row] - now[row]).exp()
            loss_T = loss_T + coefficient * (ratio_T - 1 - ratio_T.log())
        losses.append(loss_T)
    match method:
        case "grpo":
            return torch.stack([loss_T.mean() for loss_T in losses]).mean()
        case "dr_grpo":
            return torch.stack([loss_T.sum() / CAP for loss_T in losses]).mean()
        case _:
            return torch.cat(losses).mean()


def rebel(method, rows, now, old, reference, targets, models) -> Tensor:
    """The mean over groups, each by its size; nothing of a group of one."""
    eta, pairs = setting(method, "eta", 1.0), []
    for one in rows:
        for other in models.group_of(one)[:-1] if models.group_of(one)[-1] == one else []:
            ratios = [now[row].sum() - old[row].sum() for row in (one, other)]
            pairs.append(((ratios[0] - ratios[1]) / eta - (REWARDS[one] - REWARDS[other])) ** 2)
    return GROUP * torch.stack(pairs).sum() / len(rows)


def reinforce(method, rows, now, old, reference, targets, models) -> Tensor:
    coefficient = setting(method, "kl_coefficient", 0.0)
    rewards = [r - coefficient * float((old[k] - reference[k]).sum()) for k, r in enumerate(REWARDS)]
    terms = []
    for row in rows:
        baseline = VALUES[row]
        if method == "rloo":
            (other,) = {*models.group_of(row)} - {row} or {row}
            baseline = rewards[other]
        terms.append(-(now[row] - old[row]).sum().exp() * (rewards[row] - baseline))
    return torch.stack(terms).mean()


def ppo(method, rows, now, old, reference, targets, models) -> Tensor:
    return torch.cat([clipped(method, (now[r] - old[r]).exp(), targets[r][0].float()) for r in rows]).mean()


def tbrm(method, rows, now, old, reference, targets, models) -> Tensor:
    beta, errors = setting(method, "beta", 1.0), []
    for row in rows:
        logits_TV, response_T = models.logits(models.policy, row)
        first = logits_TV[0, response_T[0]]
        errors.append(first + now[row][1:].sum() - reference[row].sum() - REWARDS[row] / beta)
    return torch.stack(errors).square().mean()


def added(method, rows, now, old, reference, targets, models) -> Tensor:
    terms = []
    for row in rows:
        sampled_T = torch.tensor(batch().log_probs([row]))
        group = models.group_of(row)
        mean = sum(REWARDS[member] for member in group) / len(group)
        terms.append(-((now[row] - sampled_T).exp() * (REWARDS[row] - mean)).sum())
    return torch.stack(terms).mean()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "apo": apo, "grpo": grpo, "dr_grpo": grpo, "dapo": grpo, "rebel": rebel, "rloo": reinforce,
    "reinforce": reinforce, "ppo": ppo, "tbrm": tbrm, "added": added,
}  # fmt: skip


@pytest.fixture(scope="module")
def expected(work: Path) -> Callable[..., dict]:
    return cache(lambda method, masked=(): plain_steps(work, method, masked))


def seen(found: dict, theirs: dict) -> dict[str, float]:
    """Largest relative difference of a gradient, of what learns."""
    return {
        name: max(worst(*pair) for pair in zip(found[name], theirs[name], strict=True))
        for name in ("policy", "critic")
        if theirs[name]
    }


@pytest.mark.parametrize(("layout", "method"), CASES + FULL_CASES)
def test_steps_are_those_of_transformers_and_torch(layout: str, method: str, measured, expected) -> None:
    found = seen(measured(layout, method)["none"], expected(method))
    print(layout, method, {name: f"{value:.1e}" for name, value in found.items()})
    assert max(found.values()) <= GRADIENTS, found


@pytest.mark.parametrize(("layout", "method"), CASES + FULL_CASES)
def test_a_masked_response_is_in_nothing(layout: str, method: str, measured, expected) -> None:
    """Neither in its group nor in a mean of the batch, in no loss and in no count, of policy and critic."""
    found = seen(measured(layout, method)["masked"], expected(method, masked_of(method)))
    assert max(found.values()) <= GRADIENTS, found


@pytest.mark.parametrize(
    ("layout", "method", "fault"),
    [(layout, method, fault) for layout, method in CASES for fault in faults_of(layout, method)]
    + [
        pytest.param(*case.values, fault, marks=pytest.mark.full)
        for case in FULL_CASES
        for fault in faults_of(*case.values)
    ],
)
def test_a_fault_is_seen(layout: str, method: str, fault: str, measured, expected) -> None:
    found = seen(measured(layout, method)[fault], expected(method))
    assert {name for name, value in found.items() if value > GRADIENTS} == FAULTS[fault][1][method], found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_costs_what_the_method_says(layout: str, work: Path, measured) -> None:
    """In responses that each model's passes go over, and in what is held of each token and response."""
    for method in LAYOUTS[layout]:
        cost = objective_of(recipe_of(work, layout, method), method).cost(NUM_MINIBATCHES)
        found = measured(layout, method)["none"]
        said = {f"forward_only {model}": number for model, number in cost.forwards.items()}
        present = said.pop("forward_only present", 0)  # of the policy as well
        said["forward_only policy"] = said.pop("forward_only old_policy", 0) + present
        said |= {f"forward_backward {model}": number for model, number in cost.forward_backwards.items()}
        size = len(REWARDS) // NUM_MINIBATCHES
        assert found["calls"] == {name: size * number for name, number in said.items() if number}, method
        assert {*found["held"]["tokens"]} == {*cost.token_buffers} | {"sampler"}, method
        assert {*found["held"]["sequences"]} == {*cost.sequence_buffers}, method


def told_of_the_method(metrics: dict[str, float]) -> set[str]:
    """Of a step's, what is not told of every method's."""
    common = {"loss", "grad_norm", "grad_norm_reinforce", "skipped_steps", "masked_steps"}
    rooms = ("kl", "mismatch", "layout", "importance")
    return {name for name in metrics.keys() - common if name in KL or name.partition("/")[0] not in rooms}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_tells_what_the_method_says(layout: str, work: Path, measured) -> None:
    for method in LAYOUTS[layout]:
        objective = objective_of(recipe_of(work, layout, method), method)
        critic = {"critic/loss", "critic/grad_norm", "critic/skipped_steps"} if objective.needs_critic else set()
        assert told_of_the_method(measured(layout, method)["none"]["metrics"]) == objective.told | critic, method


def test_what_is_told_of_a_step_is_of_all_ranks(measured) -> None:
    """The same in every layout, but how it was laid out, to rounding at a log-prob's size."""
    for method in LAYOUTS["tp2-pp2"]:
        ours, theirs = (measured(layout, method)["none"]["metrics"] for layout in ("tp2-pp2", "dp2"))
        assert ours.keys() == theirs.keys()
        for name in ours:
            if not name.startswith("layout/"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), (method, name)


def test_a_critics_gradient_that_is_not_finite_is_a_skipped_step(measured) -> None:
    found = measured("dp2", "ppo")["critic not stepped"]
    assert found["skipped in a row"] == NUM_MINIBATCHES == found["metrics"]["critic/skipped_steps"]
    assert found["metrics"]["skipped_steps"] == 0


def test_rates_are_of_what_a_step_has(measured) -> None:
    parts = {"forward_backward", "train"}
    rates = {name: measured("dp2", name)["none"]["rates"] for name in ("ppo", "apo", "rebel")}
    found = {method: {name.partition("/")[2] for name in names if "tflops" in name} for method, names in rates.items()}
    assert found == {"ppo": parts | {"reference", "critic"}, "apo": parts | {"reference"}, "rebel": parts}
    assert [method for method, names in rates.items() if "critic/lr" in names] == ["ppo"]


@pytest.mark.parametrize("method", METHODS.keys() - {ADDED})
def test_a_page_names_what_is_told_of_a_step(method: str, measured) -> None:
    page = (DOCS / f"{PAGES[method]}.md").read_text()
    for name in told_of_the_method(measured("dp2", method)["none"]["metrics"]):
        assert f"`{name}`" in page or f"`{name.partition('/')[0]}/*`" in page, name


def test_the_settings_are_such_that_each_part_has_a_say(measured) -> None:
    """Tokens are clipped on either side, and values; a group is split, and one is not."""
    metrics = {name: measured("dp2", name)["none"]["metrics"] for name in METHODS}
    for name in ("grpo", "dr_grpo", "dapo", "ppo"):
        assert 0.02 < metrics[name]["clip/low"] < 0.5 and 0.02 < metrics[name]["clip/high"] < 0.5, name
    assert metrics["dapo"]["clip/dual"] > 0 and metrics["dapo"]["reward/length_penalty"] < 0
    assert 0.05 < metrics["ppo"]["critic/clipped"] < 0.95
