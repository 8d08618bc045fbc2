"""The recipe: all sections of a run, what of them cannot work together, and what follows from several of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_apo.config.base import MAY_CHANGE, Section
from megatron_apo.config.data import DataConfig, RowsConfig
from megatron_apo.config.model import ModelConfig
from megatron_apo.config.objective import APOConfig, ObjectiveConfig
from megatron_apo.config.optimizer import OptimizerConfig
from megatron_apo.config.parallel import ParallelConfig
from megatron_apo.config.reward import GraderConfig, RewardConfig
from megatron_apo.config.rollout import RolloutConfig
from megatron_apo.config.run import EvalConfig, RunConfig, TelemetryConfig
from megatron_apo.config.sampling import SamplingConfig
from megatron_apo.config.sources import Source, source_problems
from megatron_apo.config.sync import MismatchConfig, SyncConfig
from megatron_apo.config.text import write
from megatron_apo.config.train import TrainConfig, WarmupConfig
from megatron_apo.config.vstar import VStarConfig


class Recipe(Section):
    """The whole of a run. Defaults are the paper's values."""

    run: RunConfig = Field(default_factory=RunConfig)
    model: ModelConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, json_schema_extra=MAY_CHANGE)
    data: DataConfig
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    vstar: VStarConfig
    objective: ObjectiveConfig = Field(default_factory=APOConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    sync: SyncConfig = Field(default_factory=SyncConfig, json_schema_extra=MAY_CHANGE)
    mismatch: MismatchConfig = Field(default_factory=MismatchConfig, json_schema_extra=MAY_CHANGE)
    eval: EvalConfig = Field(default_factory=EvalConfig, json_schema_extra=MAY_CHANGE)
    warmup: WarmupConfig = Field(default_factory=WarmupConfig, json_schema_extra=MAY_CHANGE)
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig, json_schema_extra=MAY_CHANGE)

    def sources(self, part: Literal["train", "eval"]) -> list[Source]:
        """Of the prompts to train on, or of those held out, of which there may be none."""
        data, is_held_out = self.data, part == "eval"
        path, several = (data.eval, data.eval_sources) if is_held_out else (data.train, data.train_sources)
        most = self.eval.max_prompts if is_held_out else data.max_prompts
        if path is not None:
            return [Source(f"data.{part}", "data", "", path, data, most, None, self.reward)]
        found = []
        for index, one in enumerate(several):
            key, own_most = f"data.{part}_sources.{index}", one.max_prompts or (most if is_held_out else None)
            found.append(Source(key, key, one.name, one.path, one, own_most, one.weight, one.reward or self.reward))
        return found

    @property
    def optimizers(self) -> dict[str, OptimizerConfig]:
        """The policy's, and the critic's where there is one, by what their keys have before `optimizer`."""
        critic = self.objective.own_critic
        return {"": self.optimizer} | ({"objective.critic.": critic.optimizer} if critic else {})

    @property
    def folders(self) -> dict[str, Path]:
        """All Hugging Face folders that training reads, by their keys."""
        critic = self.objective.own_critic
        own = {"objective.critic.path": critic.path} if critic and critic.path else {}
        return self.model.folders | own

    @property
    def needs_store(self) -> bool:
        """Whether training asks for a V* store, which stage 1 makes."""
        return self.objective.needs_store or self.vstar.filter != "none"

    @property
    def graders(self) -> list[GraderConfig]:
        """Those of all sources, each once."""
        found: list[GraderConfig] = []
        for source in [*self.sources("train"), *self.sources("eval")]:
            found += [] if source.plain_grader in found else [source.plain_grader]
        return found

    @property
    def alignment(self) -> int:
        """Tokens to a multiple of which each sequence is padded, so that every rank can hold its share of it.

        Without packing the sequences are all that can be filled up for `micro_batch_alignment`.
        """
        return self.parallel.pieces_per_sequence if self.train.packing else self.micro_batch_alignment

    @property
    def micro_batch_alignment(self) -> int:
        """Tokens to a multiple of which each micro-batch is filled up, so that every rank can compute its share.

        FP8 takes a multiple of the tokens that a rank holds. Under sequence parallelism those are a tensor-parallel
        rank's: Transformer Engine makes them FP8 before it gathers them.
        """
        parallel, fp8 = self.parallel, self.model.fp8
        ranks = parallel.cp * (parallel.tp if parallel.sequence_parallel else 1)
        pieces = parallel.pieces_per_sequence
        return math.lcm(pieces, fp8.token_multiple * ranks) if fp8 else pieces

    @property
    def max_sequence_tokens(self) -> int:
        """Longest prompt plus longest response, tokens."""
        return self.data.max_prompt_tokens + self.sampling.max_response_tokens

    @property
    def responses_per_step(self) -> int:
        """That a step learns from, and that one draw is of."""
        return self.train.prompts_per_step * self.objective.samples_per_prompt

    @property
    def target_window(self) -> int:
        """Steps that draw `train.target_responses`, where each draws once."""
        return -(-self.train.target_responses // self.responses_per_step)

    @property
    def why_unsaved(self) -> str:
        """What keeps a checkpoint of this training from being read back; empty if one can be."""
        for prefix, optimizer in self.optimizers.items():
            if optimizer.cpu_offload:
                return f"{prefix}optimizer.cpu_offload={optimizer.cpu_offload}"
        return "model.fp8.param_gather" if self.model.has_fp8_weights else ""

    def save(self, path: Path) -> None:
        """Write the resolved recipe as YAML that `load_recipe` reads back."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.as_yaml())

    def as_yaml(self) -> str:
        return write(self.model_dump(mode="json"))

    def problems(self) -> list[str]:
        """Combinations of fields that cannot work, one line each."""
        return [
            *self._minibatch_problems(),
            *self.parallel.problems(self.model),
            *self.model.problems(),
            *source_problems([*self.sources("train"), *self.sources("eval")]),
            *self._idle_problems(),
            *self._interleaving_problems(),
            *self._length_problems(),
            *self.rollout.problems(),
            *self.sync.problems(self.rollout),
            *self.mismatch.problems(),
            *self.vstar.problems(self.reward),
            *self._optimizer_problems(),
            *self.train.problems(self.model, self.optimizer),
            *self.objective.problems(self.sampling, self.train),
            *self._streaming_problems(),
            *self._evaluation_problems(),
            *self._target_problems(),
        ]

    def _target_problems(self) -> list[str]:
        """Of a target that no training of so many steps reaches."""
        train = self.train
        most = train.steps * self.responses_per_step
        if train.target_reward is None or train.target_responses <= most:
            return []
        return [
            f"train.target_responses: {train.target_responses} are of {self.target_window} steps, and train.steps="
            f"{train.steps} ends before; use at most {most}"
        ]

    def _streaming_problems(self) -> list[str]:
        """Of a step that computes while its responses are generated."""
        if not self.train.streamed:
            return []
        parallel, whole = self.parallel, self.objective.whole_batch(self.reward.truncated == "mask")
        reasons = {
            f"parallel.vpp={parallel.vpp} takes micro-batches of one length, known before the first": parallel.vpp > 1,
            f"parallel.ep={parallel.ep} takes as many micro-batches on every replica": parallel.ep > 1,
            "train.offload_while_sampling=true takes away what gradients go into": self.train.offload_while_sampling,
            "rollout.sleep_while_training=true has one of the two at work at a time": self.rollout.sleep_while_training,
            whole: bool(whole),
        }
        found = [why for why, is_so in reasons.items() if is_so]
        return [f"train.streamed: true, but {why}; use false, or change that" for why in found]

    def _evaluation_problems(self) -> list[str]:
        """Of engines that answer while the ranks compute."""
        if not (self.eval.overlapped and self.rollout.sleep_while_training):
            return []
        return ["eval.overlapped: true, but with rollout.sleep_while_training=true engines are asleep then; use false"]

    def _optimizer_problems(self) -> list[str]:
        found = [
            f"{prefix}{line}"
            for prefix, optimizer in self.optimizers.items()
            for line in optimizer.problems(self.model)
        ]
        critic = self.objective.own_critic
        if critic and critic.optimizer.cpu_offload:
            found.append(
                f"objective.critic.optimizer.cpu_offload: {critic.optimizer.cpu_offload} was never tried; use 0"
            )
        return found

    def _minibatch_problems(self) -> list[str]:
        """A minibatch has whole groups, and as many responses of each replica as of any other."""
        train, dp, samples = self.train, self.parallel.dp, self.objective.samples_per_prompt
        multiple = train.minibatches * (dp // math.gcd(dp, samples))
        if train.prompts_per_step % multiple == 0:
            return []
        group = f" x objective.samples_per_prompt={samples}" if samples > 1 else ""
        return [
            f"train.prompts_per_step: {train.prompts_per_step}{group} does not divide into train.minibatches="
            f"{train.minibatches} x parallel.dp={dp}; use a multiple of {multiple}"
        ]

    def _idle_problems(self) -> list[str]:
        """What is said of rows that nothing reads, since all sources have settings of their own."""
        data = self.data
        if not data.train_sources or data.eval is not None or self.warmup.data is not None:
            return []
        names = [*RowsConfig.model_fields, "max_prompts"]
        return [
            f"data.{name}: {value!r} is of data.train, and data.train_sources are read by their own; set it there"
            for name in names
            if (value := getattr(data, name)) != DataConfig.model_fields[name].get_default(call_default_factory=True)
        ]

    def _interleaving_problems(self) -> list[str]:
        """The interleaved schedule runs packed micro-batches in groups of pp; a replica's sequences must divide."""
        train, parallel, found = self.train, self.parallel, []
        if parallel.vpp == 1:
            return []
        if not train.packing:
            found.append(
                f"train.packing: false, but parallel.vpp={parallel.vpp} takes packed micro-batches; set it to true, or "
                "use parallel.vpp=1"
            )
        batches = {
            "train.prompts_per_step": (self.responses_per_step, train.minibatches * parallel.dp),
            "sync.probe_sequences": (self.sync.probe_sequences, 1),
        }
        if self.warmup.data is not None:
            batches["warmup.sequences_per_step"] = (self.warmup.sequences_per_step, parallel.dp)
        for key, (size, parts) in batches.items():
            if size % (parts * parallel.pp):
                found.append(
                    f"{key}: {size} sequences{f' in {parts} parts' if parts > 1 else ''} do not divide into groups of "
                    f"parallel.pp={parallel.pp}, which parallel.vpp={parallel.vpp} needs; use a multiple of "
                    f"{parts * parallel.pp}"
                )
        return found

    def _length_problems(self) -> list[str]:
        most, multiple = self.train.tokens_per_micro_batch, self.micro_batch_alignment
        padded = aligned(self.max_sequence_tokens, multiple)
        if padded <= most:
            return []
        return [
            f"train.tokens_per_micro_batch: {most} cannot hold one sequence of "
            "data.max_prompt_tokens + sampling.max_response_tokens"
            + (f", padded to a multiple of {multiple}" if multiple > 1 else "")
            + f"; use at least {padded}"
        ]


def aligned(length: int, multiple: int) -> int:
    """`length` rounded up to a multiple of `multiple`."""
    return -(-length // multiple) * multiple
