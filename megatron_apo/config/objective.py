"""The training method, and its settings: a section for each method, told apart by `objective.name`.

A section's keys are the fields of the method's class in `megatron_apo/objectives`, with the same defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from megatron_apo.config.base import Section
from megatron_apo.config.optimizer import OptimizerConfig
from megatron_apo.config.sampling import SamplingConfig
from megatron_apo.config.train import TrainConfig

_TITLES = {
    "vstar": "V*",
    "batch_mean": "mean of the batch",
    "group_mean": "mean of the group",
    "leave_one_out": "mean of the group's others",
    "kernel": "kernel of the past",
}


class BaselineConfig(Section):
    """What is taken off the rewards. See `megatron_apo/values/baselines.py`."""

    source: Literal["vstar", "batch_mean", "group_mean", "leave_one_out", "kernel"] = Field(
        "vstar",
        description="vstar: of the V* store; the mean reward of the batch, of the prompt's responses, or of its "
        "others; kernel: of the prompt's own past as well",
    )
    kernel: Literal["triangular", "exponential"] = Field("triangular", description="weights of the past, source kernel")
    bandwidth: float | None = Field(
        0.5,
        gt=0,
        description="share of the run so far over which the past counts, source kernel; exponential: from 0.01; null: "
        "all of it alike, the running mean",
    )

    @property
    def title(self) -> str:
        return _TITLES[self.source]

    def whole_batch(self, samples_per_prompt: int, masks: bool) -> str:
        """Why a response's baseline may need the whole batch; empty where its own group is enough.

        masks: whether responses may have no reward.
        """
        if self.source == "batch_mean":
            return "objective.baseline.source=batch_mean is the mean of the whole batch"
        if self.source in ("kernel", "leave_one_out") and (samples_per_prompt == 1 or masks):
            alone = "reward.truncated=mask" if masks else "objective.samples_per_prompt=1"
            return (
                f"objective.baseline.source={self.source} is the mean of the whole batch where it has nothing else, as "
                f"it may with {alone}"
            )
        return ""

    def problems(self, samples_per_prompt: int) -> list[str]:
        """Combinations that cannot work, one line each."""
        if self.source == "group_mean" and samples_per_prompt == 1:
            return [
                "objective.baseline.source: group_mean of objective.samples_per_prompt=1 is the reward itself, which "
                "leaves nothing to learn; use at least 2, or another source"
            ]
        if self.source != "kernel":
            place, wanted = "objective.baseline", "objective.baseline.source=kernel"
            return [line for key in ("kernel", "bandwidth") for line in self.idle(place, key, wanted, self.source)]
        if self.kernel == "exponential" and (self.bandwidth or 1) < 0.01:
            return [
                f"objective.baseline.bandwidth: {self.bandwidth} is too small for objective.baseline.kernel="
                "exponential; use at least 0.01"
            ]
        return []


class CriticConfig(Section):
    path: Path | None = Field(None, description="Hugging Face folder of the critic's first weights; null: model.path")
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(lr=1e-5), description="the critic's own, as `optimizer` is the policy's"
    )


class _Method(Section):
    title: ClassVar[str]  # for people
    if TYPE_CHECKING:  # each has its own default
        samples_per_prompt: int

    @property
    def value_source(self) -> BaselineConfig | None:
        """What is taken off the rewards, where the method leaves that to a recipe."""
        return getattr(self, "baseline", None)

    def problems(self, sampling: SamplingConfig, train: TrainConfig) -> list[str]:
        """Combinations that cannot work, one line each."""
        return self.value_source.problems(self.samples_per_prompt) if self.value_source else []

    def whole_batch(self, masks: bool) -> str:
        """Why the targets of a response may need the whole batch; empty where those of its group are enough. masks:
        whether responses may have no reward."""
        return self.value_source.whole_batch(self.samples_per_prompt, masks) if self.value_source else ""

    @property
    def taken_off(self) -> str | None:
        """What is taken off the rewards to make advantages, for people; None without advantages."""
        return self.value_source.title if self.value_source else None

    @property
    def own_critic(self) -> CriticConfig | None:
        """What the method's critic is, where it has one."""
        return getattr(self, "critic", None)

    @property
    def needs_store(self) -> bool:
        """Whether V* is asked for."""
        return self.value_source is not None and self.value_source.source == "vstar"


def _samples(default: int, least: int = 1) -> int:
    return Field(default, ge=least, description="responses drawn for each prompt of a step, by one request")


_NAME = "the method (docs/methods)"
_CLIP = "largest ratio to the old policy is 1 + this; null: no bound"
_CLIP_LOW = "smallest ratio to the old policy is 1 - this; null: no bound"
_KL_IN_REWARD = "of the KL to the reference in the reward; 0: no reference"
_KL_IN_LOSS = "of the KL to the reference in the loss; 0: no reference"
_STD = "advantages are divided by the group's standard deviation"
_DYNAMIC = "draw other prompts for groups whose rewards are all equal"
_AVERAGING = (
    "of tokens' losses. sequence: the mean of each response's mean; constant: each response's sum, divided by "
    "sampling.max_response_tokens; token: the mean of all tokens"
)
_BUFFER = "tokens before the length cap over which a penalty grows; 0: none; null: a fifth of the cap"
_DUAL = "the loss of a negative advantage is at most this many times it (above 1); null: no bound"


class APOConfig(_Method):
    title = "A*-PO"
    name: Literal["apo"] = Field("apo", description=_NAME)
    beta2: float = Field(1e-3, gt=0, description="b2: weight of the log-ratio in the regression")
    loss_scale: Literal["paper", "unit"] = Field("paper", description="unit divides by 2*b2 (REINFORCE's units)")
    samples_per_prompt: int = _samples(1)
    baseline: BaselineConfig = Field(default_factory=BaselineConfig)


class REINFORCEConfig(_Method):
    title = "REINFORCE"
    name: Literal["reinforce"] = Field("reinforce", description=_NAME)
    kl_coefficient: float = Field(0.0, ge=0, description=_KL_IN_REWARD)
    samples_per_prompt: int = _samples(1)
    baseline: BaselineConfig = Field(default_factory=BaselineConfig)


class RLOOConfig(_Method):
    title = "RLOO"
    name: Literal["rloo"] = Field("rloo", description=_NAME)
    kl_coefficient: float = Field(0.0, ge=0, description=_KL_IN_REWARD)
    samples_per_prompt: int = _samples(4, least=2)

    @property
    def taken_off(self) -> str:
        return _TITLES["leave_one_out"]


class REBELConfig(_Method):
    title = "REBEL"
    name: Literal["rebel"] = Field("rebel", description=_NAME)
    eta: float = Field(1.0, gt=0, description="the step towards pi_old exp(eta r)")
    samples_per_prompt: int = _samples(2, least=2)

    @property
    def taken_off(self) -> str:
        return _TITLES["group_mean"]


class TBRMConfig(_Method):
    title = "TBRM"
    name: Literal["tbrm"] = Field("tbrm", description=_NAME)
    beta: float = Field(2e-3, gt=0, description="weight of the KL to the reference against the reward")
    samples_per_prompt: int = _samples(1)

    def problems(self, sampling: SamplingConfig, train: TrainConfig) -> list[str]:
        found = []
        if sampling.temperature != 1:
            found.append(
                f"sampling.temperature: {sampling.temperature}, but objective.name=tbrm takes raw logits for values, "
                "which belong to log-probs at 1; use 1"
            )
        if train.importance != "none":
            found.append(
                f"train.importance: {train.importance} would not reach the raw logit in the loss of "
                "objective.name=tbrm; use none"
            )
        return found


class GRPOConfig(_Method):
    title = "GRPO"
    name: Literal["grpo"] = Field("grpo", description=_NAME)
    samples_per_prompt: int = _samples(8, least=2)
    divide_by_std: bool = Field(True, description=_STD)
    averaging: Literal["sequence", "constant", "token"] = Field("sequence", description=_AVERAGING)
    clip_low: float | None = Field(0.2, gt=0, le=1, description=_CLIP_LOW)
    clip_high: float | None = Field(0.2, gt=0, description=_CLIP)
    dual_clip: float | None = Field(None, gt=1, description=_DUAL)
    kl_coefficient: float = Field(0.04, ge=0, description=_KL_IN_LOSS)
    kl_estimator: Literal["k2", "k3"] = Field("k3", description="of the KL in the loss (Schulman)")
    dynamic_sampling: bool = Field(False, description=_DYNAMIC)
    max_draws: int = Field(10, ge=1, description="rounds of drawing for a step at most, with dynamic_sampling")
    overlong_buffer: int | None = Field(0, ge=0, description=_BUFFER)
    overlong_penalty: float = Field(1.0, ge=0, description="the penalty at the length cap")

    @property
    def taken_off(self) -> str:
        return _TITLES["group_mean"] + (", in standard deviations" if self.divide_by_std else "")

    def whole_batch(self, masks: bool) -> str:
        if self.dynamic_sampling:
            return "objective.dynamic_sampling=true draws anew for groups of the whole batch"
        return super().whole_batch(masks)

    def problems(self, sampling: SamplingConfig, train: TrainConfig) -> list[str]:
        found = self._switched_off()
        if self.overlong_buffer is not None and self.overlong_buffer >= sampling.max_response_tokens:
            found.append(
                f"objective.overlong_buffer: {self.overlong_buffer} is not below sampling.max_response_tokens="
                f"{sampling.max_response_tokens}; lower it"
            )
        return found

    def _switched_off(self) -> list[str]:
        """What is set for a part of the method that is switched off."""
        return [
            line
            for key, switch, wanted in (
                ("max_draws", self.dynamic_sampling, "objective.dynamic_sampling=true"),
                ("overlong_penalty", self.overlong_buffer, "an objective.overlong_buffer above 0"),
                ("kl_estimator", self.kl_coefficient, "an objective.kl_coefficient above 0"),
            )
            if switch in (0, False)
            for line in self.idle("objective", key, wanted, str(switch).lower())
        ]


class DrGRPOConfig(GRPOConfig):
    title = "Dr. GRPO"
    name: Literal["dr_grpo"] = Field("dr_grpo", description=_NAME)  # type: ignore[assignment]
    divide_by_std: bool = Field(False, description=_STD)
    averaging: Literal["sequence", "constant", "token"] = Field("constant", description=_AVERAGING)
    kl_coefficient: float = Field(0.0, ge=0, description=_KL_IN_LOSS)


class DAPOConfig(GRPOConfig):
    title = "DAPO"
    name: Literal["dapo"] = Field("dapo", description=_NAME)  # type: ignore[assignment]
    samples_per_prompt: int = _samples(16, least=2)
    averaging: Literal["sequence", "constant", "token"] = Field("token", description=_AVERAGING)
    clip_high: float | None = Field(0.28, gt=0, description=_CLIP)
    kl_coefficient: float = Field(0.0, ge=0, description=_KL_IN_LOSS)
    dynamic_sampling: bool = Field(True, description=_DYNAMIC)
    overlong_buffer: int | None = Field(None, ge=0, description=_BUFFER)


class PPOConfig(_Method):
    title = "PPO"
    name: Literal["ppo"] = Field("ppo", description=_NAME)
    samples_per_prompt: int = _samples(1)
    clip_low: float | None = Field(0.2, gt=0, le=1, description=_CLIP_LOW)
    clip_high: float | None = Field(0.2, gt=0, description=_CLIP)
    dual_clip: float | None = Field(None, gt=1, description=_DUAL)
    value_clip: float | None = Field(0.2, gt=0, description="largest change of a value in a step; null: no bound")
    gamma: float = Field(1.0, ge=0, le=1, description="discount of a token")
    lam: float = Field(1.0, ge=0, le=1, description="lambda of GAE")
    whiten: bool = Field(True, description="advantages of the batch have mean 0 and variance 1")
    kl_coefficient: float = Field(1e-3, ge=0, description=_KL_IN_REWARD)
    critic: CriticConfig = Field(default_factory=CriticConfig)

    @property
    def taken_off(self) -> str:
        return "critic's value"

    def whole_batch(self, masks: bool) -> str:
        return "objective.name=ppo tells and whitens advantages by the whole batch"


def _name_of(value: object) -> str | None:
    """The method that a section is of, A*-PO where it does not say; none of what is no section."""
    name = value.get("name", "apo") if isinstance(value, dict) else getattr(value, "name", None)
    return None if name is None else str(name)


ObjectiveConfig = Annotated[
    Annotated[APOConfig, Tag("apo")]
    | Annotated[GRPOConfig, Tag("grpo")]
    | Annotated[DrGRPOConfig, Tag("dr_grpo")]
    | Annotated[DAPOConfig, Tag("dapo")]
    | Annotated[REBELConfig, Tag("rebel")]
    | Annotated[RLOOConfig, Tag("rloo")]
    | Annotated[REINFORCEConfig, Tag("reinforce")]
    | Annotated[PPOConfig, Tag("ppo")]
    | Annotated[TBRMConfig, Tag("tbrm")],
    Discriminator(_name_of),
]
