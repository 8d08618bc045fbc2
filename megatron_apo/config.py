"""The recipe: everything a run is, in one YAML file plus dotted overrides.

    recipe = load_recipe("recipe.yaml", ["train.steps=50", "parallel.tp=2"])

Each field's `description` is its documentation (`megatron-apo doctor --fields` prints them).
Every problem of a recipe is found before any work and reported at once, one line each: the key, its
value, what is allowed and the fix. Unknown keys are errors. This module imports nothing heavy.
"""

from __future__ import annotations

import copy
import datetime
import difflib
import math
from collections.abc import Hashable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from megatron_apo import recipe_text

RECIPES = Path(__file__).parent / "recipes"
TASK = "reasoning-gym:"  # before the name of a task, as a source of prompts
SHAPE = "shape:"  # before the name of a public model whose config.json is one of RECIPES/shapes

# What a field is to a resumed run and to a V* store stands at the field (`fields_marked`). Without a mark a resumed run
# must have the same value, and a store does not depend on it.
#
# A resumed run may have another value: the same numbers, elsewhere or in another order, or what only looks on.
MAY_CHANGE: JsonDict = {"resume": "may change"}
# The same, unless the learning rate decays over train.steps.
MAY_CHANGE_AT_CONSTANT_RATE: JsonDict = {"resume": "may change at a constant learning rate"}
# Alike in all shards of a store, though not in the run that reads it: what vLLM computes in is an approximation of the
# reference either way, but one that a store must not mix.
SAME_IN_ALL_SHARDS: JsonDict = {"shards": "same"}


def in_fingerprint(name: str) -> JsonDict:
    """The samples of a V* store depend on it: it is the field `name` of the store's fingerprint
    (values/fingerprint.py)."""
    return {"fingerprint": name}


def behind_fingerprint(*names: str) -> JsonDict:
    """As `in_fingerprint`, by way of these fields: a hash of what it names, say."""
    return {"behind_fingerprint": list(names)}


EstimatorName = Literal["log_mean_exp", "debiased", "beta_smoothed", "mean", "max"]


class RecipeError(ValueError):
    """One or more mistakes in a recipe. `problems` holds one line each."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__(problems)  # as `args`, so that it can be pickled to other ranks

    def __str__(self) -> str:
        return "\n".join(self.problems)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_other_kind(cls, value: object, info: ValidationInfo) -> object:
        """Numbers are no switches, nor switches numbers, though pydantic takes either for the other."""
        assert info.field_name is not None
        kinds = _kinds(cast(Hashable, cls.model_fields[info.field_name].annotation))
        values = value if isinstance(value, list) else [value]
        if Any not in kinds and bool not in kinds and any(isinstance(one, bool) for one in values):
            raise ValueError("a number or text, which true and false are not")
        if bool in kinds and type(value) in (int, float):
            raise ValueError("true or false")
        return value


class RunConfig(Section):
    dir: Path = Field(
        Path("runs/apo"),
        json_schema_extra=MAY_CHANGE,
        description="folder of this run: recipe, metrics, logs, checkpoints, report",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="seeds prompts' order, rollouts and initial weights")


class FP8Config(Section):
    recipe: Literal["tensorwise", "blockwise", "mxfp8"] = Field(
        "tensorwise", description="one scale for each tensor, block (Hopper or later) or 32 values (Blackwell)"
    )
    param_gather: bool = Field(
        False, description="hold and gather weights in FP8 too; their fp32 masters need optimizer.distributed"
    )
    bf16_first_layers: int = Field(0, ge=0, description="layers computed in bf16 at the model's start")
    bf16_last_layers: int = Field(0, ge=0, description="layers computed in bf16 at the model's end")

    @property
    def multiple(self) -> int:
        """Each dimension of an FP8 product is a multiple of it (Megatron-Core's fp8_utils.py, `get_fp8_align_size`)."""
        return 32 if self.recipe == "mxfp8" else 16

    @property
    def token_multiple(self) -> int:
        """The tokens that a rank makes FP8 are a multiple of it.

        Whole blocks of 128 are asked for only where ranks gather them (Transformer Engine's `Float8BlockQuantizer`,
        `is_quantizable`), and cost little elsewhere.
        """
        return 128 if self.recipe == "blockwise" else self.multiple

    @field_validator("recipe", mode="before")
    @classmethod
    def _has_current_scales(cls, value: object) -> object:
        if value == "delayed":
            raise ValueError(
                "'tensorwise', 'blockwise' or 'mxfp8': delayed scaling updates its scales in forwards with gradients "
                "alone, and the reference has none, so that it would drift from the policy"
            )
        return value


class ModelConfig(Section):
    path: Path = Field(
        json_schema_extra=behind_fingerprint("model_hash", "tokenizer_hash", "template_hash"),
        description="Hugging Face folder of the starting policy (config.json, safetensors, tokenizer); for `doctor` "
        "also shape:NAME, a public model's config.json without weights, of launch/recipes/shapes",
    )
    reference: Path | None = Field(
        None,
        json_schema_extra=behind_fingerprint("model_hash"),
        description="Hugging Face folder of pi_ref, or as model.path a shape; none: the same as model.path",
    )
    dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="what the trainer computes in; bf16 keeps master weights and gradients in fp32"
    )
    layers: Literal["auto", "te", "local"] = Field(
        "auto", description="Transformer Engine's layers or Megatron-Core's own; auto: te in bf16 where it can run"
    )
    fp8: FP8Config | None = Field(
        None, description="matrix products of the layers in FP8, of policy and reference alike; none: in model.dtype"
    )
    reference_mode: Literal["resident", "offload", "swap"] = Field(
        "resident",
        json_schema_extra=MAY_CHANGE,
        description="pi_ref on the device; in host memory, on the device while it computes; or in the policy's own "
        "buffers while it computes",
    )

    @field_validator("path", "reference")
    @classmethod
    def _has_a_known_shape(cls, value: Path | None) -> Path | None:
        if value is not None and (name := shape_name(value)) is not None and name not in (known := shapes()):
            raise ValueError(f"a Hugging Face folder, or one of {', '.join(SHAPE + other for other in known)}")
        return value

    @property
    def reference_path(self) -> Path:
        return self.reference or self.path

    @property
    def shapes(self) -> dict[str, Path]:
        """Those of `folders` that are shapes."""
        return {key: folder for key, folder in self.folders.items() if shape_name(folder) is not None}

    @property
    def folders(self) -> dict[str, Path]:
        """The Hugging Face folders by their keys in a recipe; the reference's where it is another."""
        reference = {} if self.reference_path == self.path else {"model.reference": self.reference_path}
        return {"model.path": self.path} | reference

    def problems(self) -> list[str]:
        """Combinations that cannot work, one line each."""
        found = []
        if self.layers == "te" and self.dtype == "fp32":
            found.append(
                "model.layers: te with model.dtype=fp32 would hold whole attention matrices, since Transformer "
                "Engine's fused attention is 16-bit; set model.dtype to bf16, or model.layers to local"
            )
        if self.fp8 and self.dtype == "fp32":
            found.append("model.fp8: what is not in FP8 is bf16, and model.dtype is fp32; set it to bf16")
        if self.fp8 and self.layers == "local":
            found.append("model.fp8: model.layers=local has no FP8, Transformer Engine has; set model.layers to auto")
        if self.reference_mode != "resident" and self.fp8 and self.fp8.param_gather:
            found.append(
                f"model.reference_mode: {self.reference_mode} moves plain tensors, and with model.fp8.param_gather "
                "weights are Transformer Engine's; use resident, or model.fp8.param_gather=false"
            )
        return found


class ParallelConfig(Section):
    tp: int = Field(1, ge=1, description="tensor-parallel ranks; divides the attention heads")
    pp: int = Field(1, ge=1, description="pipeline-parallel stages; divides the layers")
    vpp: int = Field(
        1, ge=1, description="model chunks of a pipeline rank (interleaved schedule); pp x vpp divides the layers"
    )
    cp: int = Field(1, ge=1, description="context-parallel ranks: each holds its part of every sequence")
    dp: int = Field(1, ge=1, description="data-parallel replicas")
    ep: int = Field(1, ge=1, description="expert-parallel ranks, a divisor of dp x cp; divides a mixture's experts")
    sequence_parallel: bool = Field(
        False, description="split what lies between tensor-parallel layers over their ranks; Transformer Engine only"
    )
    ranks_per_node: int | None = Field(
        None,
        ge=1,
        json_schema_extra=MAY_CHANGE,
        description="ranks of each node of a SLURM job; none: as many as it has GPUs, without GPUs all on one node",
    )
    threads_per_rank: int = Field(
        1, ge=1, description="CPU threads of each trainer rank; optimizer.cpu_offload updates by them"
    )
    timeout_s: float = Field(
        1800, gt=0, description="how long a collective may wait, or a rank be silent, until the run ends"
    )

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def micro_batch_group(self) -> int:
        """The number of micro-batches is a multiple of this: the interleaved schedule runs them in groups of pp."""
        return self.pp if self.vpp > 1 else 1

    def problems(self, model: ModelConfig) -> list[str]:
        """Combinations that cannot work, one line each."""
        found = []
        if (self.dp * self.cp) % self.ep:
            found.append(
                f"parallel.ep: {self.ep} does not divide parallel.dp={self.dp} x parallel.cp={self.cp}, the replicas "
                f"that hold the experts together; make the product a multiple of {self.ep}"
            )
        if self.vpp > 1 and self.pp == 1:
            found.append(f"parallel.vpp: {self.vpp} chunks need a pipeline; set parallel.pp to 2 or more, or use 1")
        if self.sequence_parallel and self.tp == 1:
            found.append(
                "parallel.sequence_parallel: there is nothing to split with parallel.tp=1; use false, or a larger "
                "parallel.tp"
            )
        if self.sequence_parallel and (model.layers == "local" or model.dtype == "fp32"):
            found.append(
                "parallel.sequence_parallel: only Transformer Engine's layers have it, which are not chosen with "
                f"model.layers={model.layers} and model.dtype={model.dtype}; set these to auto and bf16, or use false"
            )
        return found


_BEHIND_ROWS = behind_fingerprint("dataset_hash") | MAY_CHANGE  # a store, which stays the run's, has their hash


class RowsConfig(Section):
    """How the rows of a source are read and shown."""

    subset: str | None = Field(
        None,
        json_schema_extra=_BEHIND_ROWS,
        description="configuration of a hub dataset, e.g. main; none: its default",
    )
    split: str = Field(
        "train", json_schema_extra=_BEHIND_ROWS, description="split to read when the source is a hub dataset"
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        json_schema_extra=_BEHIND_ROWS,
        description="of a reasoning-gym task: its config's fields there, and seed",
    )
    preset: Literal["gsm8k", "math", "aime", "openr1", "deepscaler", "verl", "trl", "openrlhf"] | None = Field(
        None,
        json_schema_extra=behind_fingerprint("dataset_hash", "template_hash") | MAY_CHANGE,
        description="public dataset whose columns and prompt_format apply (for reward math; gsm8k: for reward gsm8k), "
        "or columns as verl, trl or openrlhf have them; its rows without an answer are counted, listed and left out",
    )
    prompt_column: str | None = Field(
        None,
        json_schema_extra=_BEHIND_ROWS,
        description="column of the prompt's text; none: the preset's, else prompt",
    )
    answer_column: str | None = Field(
        None,
        json_schema_extra=_BEHIND_ROWS,
        description="column of the reference; none: the preset's, else answer",
    )
    prompt_format: str | None = Field(
        None,
        json_schema_extra=behind_fingerprint("template_hash") | MAY_CHANGE,
        description="text around {prompt}, other braces are themselves; none: the preset's, else {prompt} alone",
    )

    @field_validator("prompt_format", mode="before")
    @classmethod
    def _has_one_place(cls, value: object) -> object:
        if value is not None and (not isinstance(value, str) or value.count("{prompt}") != 1):
            raise ValueError("text that has {prompt} in it once, in quotes")
        return value


class GraderConfig(Section):
    name: str = Field(
        "math",
        json_schema_extra=behind_fingerprint("reward_name"),
        description="arithmetic, gsm8k, math, reasoning-gym, or your own as my_module:MyReward",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        json_schema_extra=in_fingerprint("reward_options"),
        description="keyword arguments of that reward",
    )


_SOURCE = f"a .jsonl or .parquet file, a hub dataset's name, or {TASK}TASK"


class _LooksFor(NamedTuple):
    """The form of an answer that a reward looks for, unless its option `unless_off` is false."""

    form: str
    unless_off: str


_LOOKS_FOR = {"gsm8k": _LooksFor("a number after ####", "strict"), "math": _LooksFor("\\boxed{}", "boxed")}


class SourceConfig(RowsConfig):
    """One of several sources of prompts."""

    name: str = Field(min_length=1, pattern=r"^[\w.+-]+$", description="of the source, in metrics")
    path: str = Field(json_schema_extra=MAY_CHANGE, description=_SOURCE)
    max_prompts: int | None = Field(
        None, ge=1, json_schema_extra=MAY_CHANGE, description="first rows; none: all; reasoning-gym: so many"
    )
    weight: float | None = Field(
        None, gt=0, description="its share of a step's prompts, beside the others'; none, of all: their prompts' number"
    )
    reward: GraderConfig | None = Field(
        None, json_schema_extra=MAY_CHANGE, description="what grades its responses; none: the recipe's reward"
    )


def _one_form(value: str | None, info: ValidationInfo, name: str) -> str | None:
    sources = info.data.get(f"{name}_sources")
    if value is not None and sources:
        raise ValueError(f"null with data.{name}_sources, or leave these out")
    if value is None and sources == [] and name == "train":
        raise PydanticCustomError("missing", "missing")
    return value


class Source(NamedTuple):
    """Where prompts come from. key: the recipe's, of what says where; rows_key: of what says how they are read."""

    key: str
    rows_key: str
    name: str  # "" where it is the only one
    path: str
    rows: RowsConfig
    max_prompts: int | None
    weight: float | None
    grader: GraderConfig

    @property
    def task(self) -> str | None:
        """ "chain_sum" of reasoning-gym:chain_sum, None of a file or a dataset of the hub."""
        return self.path.removeprefix(TASK) if self.path.startswith(TASK) else None

    @property
    def plain_grader(self) -> GraderConfig:
        """Name and options alone, where the grader is the recipe's reward."""
        return GraderConfig(name=self.grader.name, options=self.grader.options)

    @property
    def max_prompts_key(self) -> str:
        return "eval.max_prompts" if self.key == "data.eval" else f"{self.rows_key}.max_prompts"


class DataConfig(RowsConfig):
    train_sources: list[SourceConfig] = Field(
        default_factory=list,
        json_schema_extra=behind_fingerprint("dataset_hash", "sources"),
        description="in place of data.train: several, mixed by weight, each with its own columns, preset and reward",
    )
    train: str | None = Field(None, json_schema_extra=_BEHIND_ROWS, description=f"prompts to train on: {_SOURCE}")
    eval_sources: list[SourceConfig] = Field(
        default_factory=list,
        json_schema_extra=MAY_CHANGE,
        description="in place of data.eval: held-out prompts with columns, preset and reward of their own",
    )
    eval: str | None = Field(
        None,
        json_schema_extra=MAY_CHANGE,
        description="held-out prompts, read as data.train is; none: no evaluation",
    )
    max_prompts: int | None = Field(
        None,
        ge=1,
        json_schema_extra=_BEHIND_ROWS,
        description="first rows of data.train; none: all; reasoning-gym: so many",
    )
    template: Literal["raw", "chat"] = Field(
        "chat",
        json_schema_extra=behind_fingerprint("template"),
        description="raw: the text as it is; chat: the chat template",
    )
    system: str | None = Field(
        None,
        json_schema_extra=behind_fingerprint("template_hash"),
        description="system message of the chat template; none: the template's default",
    )
    thinking: bool | None = Field(
        None,
        json_schema_extra=behind_fingerprint("thinking"),
        description="the chat template's thinking switch; none: the template's default",
    )
    date: datetime.date | None = Field(
        None,
        json_schema_extra=behind_fingerprint("template_hash"),
        description="day, as 2024-07-26, for a chat template that else writes today's; none: it writes no day",
    )
    max_prompt_tokens: int = Field(
        1024,
        ge=1,
        json_schema_extra=in_fingerprint("max_prompt_tokens"),
        description="longer prompts are counted, listed and left out",
    )

    @field_validator("train")
    @classmethod
    def _is_there(cls, value: str | None, info: ValidationInfo) -> str | None:
        return _one_form(value, info, "train")

    @field_validator("eval")
    @classmethod
    def _is_of_one_form(cls, value: str | None, info: ValidationInfo) -> str | None:
        return _one_form(value, info, "eval")

    @field_validator("train_sources", "eval_sources")
    @classmethod
    def _have_names(cls, value: list[SourceConfig]) -> list[SourceConfig]:
        names = [source.name for source in value]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"names of their own for all sources, {twice[0]} is there twice")
        if 0 < sum(source.weight is None for source in value) < len(value):
            raise ValueError("a weight for each source, or for none")
        return value

    @field_validator("date", mode="before")
    @classmethod
    def _is_a_day(cls, value: object) -> object:
        if value is None or type(value) is datetime.date:
            return value
        with suppress(ValueError):
            if isinstance(value, str) and (day := datetime.date.fromisoformat(value)).isoformat() == value:
                return day
        raise ValueError("a day as YYYY-MM-DD, such as 2024-07-26, or null")

    @field_validator("system")
    @classmethod
    def _has_a_chat(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("template") == "raw":
            raise ValueError("null with data.template: raw, which has no system message, or data.template: chat")
        return value


class SamplingConfig(Section):
    temperature: float = Field(
        1.0,
        gt=0,
        json_schema_extra=in_fingerprint("temperature"),
        description="sampling temperature of both stages; log-probs are under it",
    )
    top_p: float = Field(
        1.0,
        ge=1,
        le=1,
        json_schema_extra=in_fingerprint("top_p"),
        description="1 only: truncated sampling changes the policy that is sampled",
    )
    top_k: Literal[-1] = Field(
        -1,
        json_schema_extra=in_fingerprint("top_k"),
        description="-1 only: truncated sampling changes the policy that is sampled",
    )
    max_response_tokens: int = Field(
        1024,
        ge=1,
        json_schema_extra=in_fingerprint("max_response_tokens"),
        description="length cap of a response; part of V*'s provenance",
    )
    stop_token_ids: list[int] | None = Field(
        None,
        json_schema_extra=behind_fingerprint("stop_token_ids"),
        description="ids that end a response; null: the model's EOS and its chat template's end of turn; []: none does",
    )


class RewardConfig(GraderConfig):
    workers: int = Field(1, ge=1, json_schema_extra=MAY_CHANGE, description="grader processes")
    time_limit_s: float = Field(5.0, gt=0, description="a grader that takes longer is killed and its sample fails")
    memory_limit_gib: float = Field(
        8.0, gt=0, description="address space of a grader process; beyond it the sample fails"
    )
    failure_reward: float = Field(
        0.0,
        json_schema_extra=in_fingerprint("failure_reward"),
        description="reward of a sample whose grader hung, died or threw",
    )
    truncated: Literal["grade", "fail", "mask"] = Field(
        "grade",
        json_schema_extra=in_fingerprint("truncated"),
        description="responses cut at the length cap: graded like others; given failure_reward unseen; or in no V* and "
        "no loss, and graded in evaluations alone",
    )


class AdaptiveConfig(Section):
    stderr: float = Field(0.1, gt=0, description="prompts are sampled until V*'s standard error is at most this")
    beta1: float = Field(0.5, gt=0, description="b1 of the V* that stderr is meant for")
    step: int = Field(4, ge=1, description="samples of a further round")
    most: int = Field(64, ge=1, description="samples that no prompt exceeds")
    all_wrong: int = Field(32, ge=0, description="least samples of a prompt that has no reward above 0")
    reward_range: tuple[float, float] = Field((0.0, 1.0), description="lowest and highest reward there can be")


class VStarConfig(Section):
    dir: Path = Field(json_schema_extra=MAY_CHANGE, description="folder of the V* store")
    samples_per_prompt: int = Field(
        8,
        ge=1,
        json_schema_extra=in_fingerprint("samples_per_prompt"),
        description="N: responses of pi_ref per prompt (of the first round)",
    )
    adaptive: AdaptiveConfig | None = Field(
        None,
        json_schema_extra=in_fingerprint("adaptive"),
        description="further rounds where V* is uncertain; none: N for all. Where sampling stops by what it found, "
        "shares of right samples are biased; estimator beta_smoothed suits it",
    )
    samples_used: int | None = Field(None, ge=1, description="stage 2 takes each prompt's first so many; none: all")
    beta1: float = Field(0.5, gt=0, description="b1 of V* = b1 log mean exp(r/b1)")
    estimator: EstimatorName = Field(
        "log_mean_exp", description="how rewards become V*; beta_smoothed takes rewards of 0 and 1 alone"
    )
    filter: Literal["none", "all_wrong", "all_right", "both", "success_rate"] = Field(
        "none", description="prompts left out of stage 2"
    )
    success_rate: tuple[float, float] = Field(
        (0.0, 1.0), description="filter success_rate keeps prompts whose share of right samples lies in between"
    )
    prefix_caching: bool = Field(True, description="stage 1's samples of a prompt share its prefill")
    claim_expires_s: float = Field(
        300,
        ge=5,
        description="a worker silent for longer is dead, its shards go to others (also of an evaluation); well above "
        "NFS's caching",
    )
    prompts_per_shard: int = Field(
        64,
        ge=1,
        json_schema_extra=SAME_IN_ALL_SHARDS | MAY_CHANGE,
        description="rows of one Parquet shard: what a worker takes at a time, and a killed one loses",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**31,
        json_schema_extra=in_fingerprint("seed"),
        description="seeds the samples of pi_ref; runs of any run.seed can share a store",
    )
    keep_responses: bool = Field(
        False, json_schema_extra=SAME_IN_ALL_SHARDS | MAY_CHANGE, description="store the sampled token ids as well"
    )


class ObjectiveConfig(Section):
    name: Literal["apo"] = Field("apo", description="the method; see megatron_apo/objectives")
    beta2: float = Field(1e-3, gt=0, description="b2: weight of the log-ratio in the regression")
    loss_scale: Literal["paper", "unit"] = Field("paper", description="unit divides by 2*b2 (REINFORCE's units)")


# Megatron-Core's (transformer_config.py, `__post_init__`); what layers have of them: model/recompute.py.
RecomputeModule = Literal["core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts"]


class TrainConfig(Section):
    steps: int = Field(200, ge=1, json_schema_extra=MAY_CHANGE_AT_CONSTANT_RATE, description="rollout batches")
    prompts_per_step: int = Field(256, ge=1, description="prompts of one rollout batch")
    minibatches: int = Field(2, ge=1, description="optimizer steps per rollout batch; divides prompts_per_step")
    packing: bool = Field(
        True, json_schema_extra=MAY_CHANGE, description="pack sequences; false: pad to the longest of a micro-batch"
    )
    tokens_per_micro_batch: int = Field(
        4096, ge=1, json_schema_extra=MAY_CHANGE, description="token budget of one micro-batch (padding included)"
    )
    log_prob_chunk_tokens: int = Field(
        2048, ge=1, json_schema_extra=MAY_CHANGE, description="tokens whose logits exist at once"
    )
    entropy: bool = Field(
        False,
        json_schema_extra=MAY_CHANGE,
        description="also measure the policy's entropy, from the logits of the training pass",
    )
    importance: Literal["none", "token", "sequence"] = Field(
        "none",
        description="weigh the gradient of each token, or each response's, by min(pi / pi_sampler, importance_cap) at "
        "the weights that sampled",
    )
    importance_cap: float = Field(2.0, gt=0, description="largest importance weight")
    first_log_ratio_tolerance: float | None = Field(
        None,
        ge=0,
        json_schema_extra=MAY_CHANGE,
        description="largest |log pi/pi_ref| of a token on the first batch, nats, where both are one model; none: 0, "
        "and on Transformer Engine's layers 0.1 in bf16 and 0.5 in FP8",
    )
    max_skipped_steps: int = Field(
        3,
        ge=1,
        json_schema_extra=MAY_CHANGE,
        description="optimizer steps in a row with a gradient that is not finite, at which the run stops",
    )
    save_every: int = Field(
        0, ge=0, json_schema_extra=MAY_CHANGE, description="steps between checkpoints; 0: only the final HF export"
    )
    record: bool = Field(
        False, json_schema_extra=MAY_CHANGE, description="keep each step's batch in RUN/rollouts, for train.replay"
    )
    replay: Path | None = Field(
        None,
        json_schema_extra=MAY_CHANGE,
        description="folder of recorded batches to train on, without vLLM; none: sample them",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        json_schema_extra=MAY_CHANGE,
        description="what backward computes again: selective: parts of layers, by default feed-forward ones; "
        "full: layers' inside",
    )
    recompute_modules: list[RecomputeModule] | None = Field(
        None,
        min_length=1,
        json_schema_extra=MAY_CHANGE,
        description="parts that selective recomputes; null: mlp, or moe where there are experts",
    )
    recompute_method: Literal["uniform", "block"] = Field(
        "uniform",
        json_schema_extra=MAY_CHANGE,
        description="full: all layers, recompute_layers at a time, or only the first recompute_layers",
    )
    recompute_layers: int = Field(
        1, ge=1, json_schema_extra=MAY_CHANGE, description="layers of recompute_method; of each model chunk"
    )
    offload_while_sampling: bool = Field(
        False,
        json_schema_extra=MAY_CHANGE,
        description="gradients, main weights and optimizer state leave the GPU while vLLM generates",
    )

    def problems(self, model: ModelConfig, optimizer: OptimizerConfig) -> list[str]:
        """Combinations that cannot work, one line each."""
        found = []
        default = TrainConfig.model_fields
        for key, kind in (
            ("recompute_modules", "selective"),
            ("recompute_method", "full"),
            ("recompute_layers", "full"),
        ):
            if (value := getattr(self, key)) != default[key].default and self.recompute != kind:
                found.append(
                    f"train.{key}: {value} is for train.recompute={kind}, and it is {self.recompute}; set that, or "
                    "leave it out"
                )
        if self.importance_cap != default["importance_cap"].default and self.importance == "none":
            found.append(
                f"train.importance_cap: {self.importance_cap} is for train.importance=token or sequence, and it is "
                "none; set that, or leave it out"
            )
        if self.save_every and optimizer.cpu_offload:  # Megatron-Core can; no checkpoint of it was ever read back
            found.append(
                f"train.save_every: {self.save_every} is untested with optimizer.cpu_offload={optimizer.cpu_offload}; "
                "use 0, or optimizer.cpu_offload=0"
            )
        if not (model.fp8 and model.fp8.param_gather):
            return found
        # Both take weights for plain bytes.
        settings = {"save_every": (self.save_every, 0), "offload_while_sampling": (self.offload_while_sampling, False)}
        return found + [
            f"train.{key}: {value} does not take the FP8 weights that model.fp8.param_gather makes; use {usual}, or "
            "model.fp8.param_gather=false"
            for key, (value, usual) in settings.items()
            if value != usual
        ]


class OptimizerConfig(Section):
    lr: float = Field(1e-6, gt=0, description="peak learning rate")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of a decay")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="decay after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="optimizer steps of linear warm-up")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first-moment decay")
    beta2: float = Field(0.95, ge=0, lt=1, description="Adam's second-moment decay")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon; mind the gradient's scale, 2*b2 for loss_scale paper")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    clip_grad: float = Field(1.0, ge=0, description="largest gradient norm; 0: no clipping")
    distributed: bool = Field(True, description="shard optimizer state over data-parallel ranks")
    cpu_offload: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of main weights and moments that live and are updated on the CPU; Transformer Engine only",
    )
    moments: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="precision of Adam's moments; bf16 with Transformer Engine 2.13 or later only",
    )

    def problems(self, model: ModelConfig) -> list[str]:
        """Combinations that cannot work, one line each."""
        found = []
        if self.min_lr > self.lr:
            found.append(f"optimizer.min_lr: {self.min_lr} is above optimizer.lr={self.lr}; lower it")
        for key, value, default in (("cpu_offload", self.cpu_offload, 0), ("moments", self.moments, "fp32")):
            if value != default and not self.distributed:
                found.append(f"optimizer.{key}: {value} is the sharded optimizer's; set optimizer.distributed to true")
            if value != default and model.dtype == "fp32":
                found.append(f"optimizer.{key}: {value} is for bf16 weights; set model.dtype to bf16, or use {default}")
        if self.cpu_offload and self.moments == "bf16":
            found.append(
                f"optimizer.moments: bf16, but optimizer.cpu_offload={self.cpu_offload} keeps them in fp32; use fp32, "
                "or optimizer.cpu_offload=0"
            )
        if model.fp8 and model.fp8.param_gather and not self.distributed:
            found.append(
                "model.fp8.param_gather: only the distributed optimizer turns fp32 master weights into FP8 ones; set "
                "optimizer.distributed to true, or use false"
            )
        if self.cpu_offload and model.fp8 and model.fp8.param_gather:
            found.append(
                f"optimizer.cpu_offload: {self.cpu_offload} does not take the FP8 weights that model.fp8.param_gather "
                "makes; use 0, or model.fp8.param_gather=false"
            )
        return found


class RolloutConfig(Section):
    placement: Literal["colocated", "dedicated"] = Field(
        "colocated",
        json_schema_extra=MAY_CHANGE,
        description="stage 2's engines: colocated: spread over the machines of the trainer's ranks; dedicated: on "
        "machines of their own, each of which runs `megatron-apo serve`",
    )
    replicas: int = Field(
        1,
        ge=1,
        json_schema_extra=MAY_CHANGE,
        description="vLLM engines, each of tp GPUs (CPU: workers) of its own on one machine; colocated ones are spread "
        "over the trainer's machines",
    )
    driver: str | None = Field(
        None,
        json_schema_extra=MAY_CHANGE,
        description="HOST:PORT where rank 0 takes in machines with engines; for dedicated ones",
    )
    host: str = Field(
        "127.0.0.1", json_schema_extra=MAY_CHANGE, description="interface an engine binds to; keep it private"
    )
    advertise_host: str | None = Field(
        None,
        min_length=1,
        json_schema_extra=MAY_CHANGE,
        description="address by which engines are reached; none: rollout.host, or this machine",
    )
    port: int = Field(
        0,
        ge=0,
        le=65535,
        json_schema_extra=MAY_CHANGE,
        description="of the first engine, the next ones follow; 0: free ports",
    )
    python: str | None = Field(
        None, json_schema_extra=MAY_CHANGE, description="Python interpreter that has vLLM; none: this one"
    )
    tp: int = Field(1, ge=1, description="vLLM's tensor-parallel size")
    ep: int = Field(
        1,
        ge=1,
        description="vLLM's expert-parallel size, for mixtures: 1, or tp, whose workers then share out experts",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", json_schema_extra=SAME_IN_ALL_SHARDS, description="vLLM's compute type"
    )
    max_num_seqs: int = Field(256, ge=1, description="sequences vLLM decodes at once")
    max_num_batched_tokens: int = Field(
        16384, ge=64, description="tokens of one vLLM step; without a GPU it holds a whole sequence"
    )
    kv_cache_gib: float = Field(
        1.0,
        gt=0,
        json_schema_extra=MAY_CHANGE,
        description="KV cache on each of the engine's tp GPUs (CPU: workers), GiB",
    )
    kv_cache_dtype: Literal["auto", "fp8"] = Field(
        "auto", json_schema_extra=SAME_IN_ALL_SHARDS, description="fp8 halves the KV cache; GPU only"
    )
    quantization: Literal["fp8"] | None = Field(
        None, json_schema_extra=SAME_IN_ALL_SHARDS, description="vLLM's weights in FP8; GPU only"
    )
    prefix_caching: bool = Field(
        False,
        description="stage 2's samples of a prompt share its prefill until the next sync; their numbers then depend on "
        "which came first (stage 1: vstar.prefix_caching)",
    )
    sleep_while_training: bool = Field(
        False,
        json_schema_extra=MAY_CHANGE,
        description="vLLM drops its KV cache and keeps its weights in host memory while the trainer computes; GPU only",
    )
    gpu_memory_utilization: float = Field(
        0.5,
        gt=0,
        le=1,
        json_schema_extra=MAY_CHANGE,
        description="share of a GPU that must be free when vLLM starts; without meaning on a CPU",
    )
    threads: int | None = Field(
        None, ge=1, json_schema_extra=MAY_CHANGE, description="CPU threads of each vLLM worker; none: vLLM decides"
    )
    extra_args: list[str] = Field(default_factory=list, description="appended to the server's command line as they are")
    start_timeout_s: float = Field(
        600, gt=0, json_schema_extra=MAY_CHANGE, description="how long a server may take to answer"
    )
    request_timeout_s: float = Field(
        3600, gt=0, json_schema_extra=MAY_CHANGE, description="how long an engine may take over one request"
    )

    def problems(self) -> list[str]:
        """Combinations that cannot work, by vLLM's own conditions, one line each."""
        found = []
        if self.max_num_batched_tokens < self.max_num_seqs:
            found.append(
                f"rollout.max_num_batched_tokens: {self.max_num_batched_tokens} is below rollout.max_num_seqs="
                f"{self.max_num_seqs}; use at least that"
            )
        if self.ep not in (1, self.tp):
            found.append(
                f"rollout.ep: {self.ep} is neither 1 nor rollout.tp={self.tp}, whose workers share out experts; "
                "use one of them"
            )
        found += self._placement_problems()
        if self.port and self.port + self.replicas - 1 > 65535:
            found.append(
                f"rollout.port: {self.port} leaves no ports for rollout.replicas={self.replicas}; use at most "
                f"{65536 - self.replicas}, or 0"
            )
        if self.quantization == "fp8" and self.dtype == "float32":
            found.append(
                "rollout.quantization: fp8, but what is not in FP8 is 16-bit, and rollout.dtype is float32; set that "
                "to bfloat16"
            )
        return found

    def _placement_problems(self) -> list[str]:
        found = []
        if self.placement == "dedicated" and self.driver is None:
            found.append("rollout.driver: missing; give HOST:PORT of rank 0, where dedicated engines join")
        if self.placement == "colocated" and self.driver is not None:
            found.append(
                f"rollout.driver: {self.driver} is for rollout.placement=dedicated, and it is colocated; set that, or "
                "leave it out"
            )
        if self.driver is not None:
            host, _, port = self.driver.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 65536:
                found.append(f"rollout.driver: {self.driver!r} is not HOST:PORT; give both, such as node0:29600")
        if self.placement == "dedicated" and self.sleep_while_training:
            found.append(
                "rollout.sleep_while_training: true, but dedicated engines have GPUs of their own; use false, or "
                "rollout.placement=colocated"
            )
        return found


class Difference(NamedTuple):
    """|vLLM's log-prob - trainer's| of probe tokens, nats."""

    mean: float
    max: float


class SyncConfig(Section):
    transport: Literal["auto", "shm", "collective", "ipc"] = Field(
        "auto",
        description="shm: buckets in host memory that trainer and engines share; collective: over the network, from "
        "each pipeline stage to every engine; ipc: in memory of the GPU that a rank and an engine share; auto: shm "
        "where all engines are on rank 0's machine, else collective, or ipc for colocated ones on GPUs",
    )
    timeout_s: float = Field(
        120.0,
        ge=1,
        json_schema_extra=MAY_CHANGE,
        description="how long an engine may be silent while it is sent weights",
    )
    dir: Path | None = Field(None, description="folder of the shm transport; none: a private one under /dev/shm")
    bucket_mib: int = Field(
        32, ge=1, json_schema_extra=MAY_CHANGE, description="weights that travel at a time; three such are in sync.dir"
    )
    probe_every: int = Field(
        50, ge=1, description="steps between comparisons of log-probs with vLLM's (always before the first)"
    )
    probe_sequences: int = Field(8, ge=1, description="sequences whose log-probs are compared")
    probe_tokens: int = Field(64, ge=2, description="tokens of each of them; they are made of prompts")
    probe_tolerance: float | None = Field(
        None, gt=0, description="largest |log-prob difference| of a probe token; none: by precision, 1e-4 in fp32"
    )
    probe_tolerance_mean: float | None = Field(
        None, gt=0, description="mean |log-prob difference| of the probe tokens; none: by precision, 2e-5 in fp32"
    )

    def tolerance(self, model: ModelConfig, rollout: RolloutConfig) -> Difference:
        """What right weights should stay below in this precision, where the recipe does not say.

        It judges that vLLM computes what the trainer does; that it has the weights is proven tensor by tensor at every
        sync, in any precision. In bf16 a mean of .002 and a maximum of .06 were seen on a CPU. The rest are estimates.
        A log-prob is a difference of logits. bf16 keeps one of 16 to 32 to 1/16, and vLLM writes logits in its own
        dtype; 1.0 leaves room for 16 such roundings, of both logits and of the hidden states before them. FP8's values
        have 4 bits less, but only as factors of sums, where most errors cancel: twice that. Means are of hundreds of
        tokens, which differ either way: ten times what was seen, and as much again for FP8.
        """
        if model.fp8 or rollout.quantization or rollout.kv_cache_dtype == "fp8":
            usual = Difference(mean=0.1, max=2.0)
        elif (model.dtype, rollout.dtype) == ("fp32", "float32"):
            usual = Difference(mean=2e-5, max=1e-4)
        else:
            usual = Difference(mean=0.02, max=1.0)
        return Difference(self.probe_tolerance_mean or usual.mean, self.probe_tolerance or usual.max)


class MismatchConfig(Section):
    warn: float | None = Field(
        3.0,
        gt=1,
        description="a step's mean |log-prob trainer - sampler| is warned of above so many times its baseline",
    )
    stop: float | None = Field(
        10.0, gt=1, description="and ends the run above so many, before the optimizer's step; none: never"
    )
    floor: float | None = Field(
        None,
        gt=0,
        description="least baseline, nats a token; the baseline is the median of the run's first 20 steps. none: by "
        "precision, 1e-5 in fp32",
    )

    def least_baseline(self, model: ModelConfig, rollout: RolloutConfig) -> float:
        """`floor`, or what the mean over a step's tokens should stay well below in this precision, nats.

        fp32: the demonstration has 1e-6. bf16: .002 was seen on a GPU, and vime tells of .011 with Qwen3-4B. The floors
        are ten and five times what was seen, so that with factors of 3 and 10 an honest first step, of which no median
        is known yet, is well below either limit: 3e-5 and 1e-4 in fp32, .03 and .1 in bf16. NeMo-RL accepts 1.05, in
        hard cases 1.1, of the mean of exp |difference|, which is 1 more than the mean of small differences. FP8 is an
        estimate, five times bf16's: 4 bits less, but only in factors of sums, where most errors cancel.
        """
        if self.floor is not None:
            return self.floor
        if model.fp8 or rollout.quantization or rollout.kv_cache_dtype == "fp8":
            return 0.05
        return 1e-5 if (model.dtype, rollout.dtype) == ("fp32", "float32") else 0.01

    def problems(self) -> list[str]:
        """Combinations that cannot work, one line each."""
        if self.warn is not None and self.stop is not None and self.warn > self.stop:
            return [f"mismatch.warn: {self.warn} is above mismatch.stop={self.stop}; lower it, or use null"]
        return []


class EvalConfig(Section):
    samples: int = Field(8, ge=1, description="k of avg@k at sampling.temperature")
    every: int = Field(0, ge=0, description="steps between evaluations; 0: only before and after")
    max_prompts: int | None = Field(
        None, ge=1, description="first rows of a held-out source without a number of its own; none: all"
    )
    prompts_per_shard: int = Field(
        8, ge=1, description="`evaluate`: prompts that a worker takes at a time, and a killed one loses"
    )


class WarmupConfig(Section):
    start: Path | None = Field(
        None, description="HF folder that a warm start begins from; it is exported to model.path"
    )
    data: str | None = Field(None, description="SFT data: prompt and response columns; none: no warm start")
    response_column: str = Field("response", description="column that holds the target response")
    steps: int = Field(400, ge=1, description="optimizer steps")
    sequences_per_step: int = Field(64, ge=1, description="sequences of one optimizer step")
    lr: float = Field(
        1e-3, gt=0, description="peak learning rate, after a twentieth of the steps; it falls linearly to 0"
    )


class TelemetryConfig(Section):
    tensorboard: bool = Field(True, description="write RUN/tensorboard")
    progress: bool = Field(True, description="draw progress bars")
    wandb: str | None = Field(
        None, min_length=1, description="Weights & Biases project to write to as well; offline where it is not reached"
    )
    peak_tflops: float | None = Field(
        None, gt=0, description="peak of one rank's device, for MFU; none: by the GPU's name, no MFU for one not known"
    )


class Recipe(Section):
    """The whole of a run. Defaults are the paper's values."""

    run: RunConfig = Field(default_factory=RunConfig)
    model: ModelConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, json_schema_extra=MAY_CHANGE)
    data: DataConfig
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    vstar: VStarConfig
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    sync: SyncConfig = Field(default_factory=SyncConfig, json_schema_extra=MAY_CHANGE)
    mismatch: MismatchConfig = Field(default_factory=MismatchConfig, json_schema_extra=MAY_CHANGE)
    eval: EvalConfig = Field(default_factory=EvalConfig, json_schema_extra=MAY_CHANGE)
    warmup: WarmupConfig = Field(default_factory=WarmupConfig, json_schema_extra=MAY_CHANGE)
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig, json_schema_extra=MAY_CHANGE)

    def problems(self) -> list[str]:
        """Combinations of fields that cannot work, one line each."""
        found = []
        train, parallel = self.train, self.parallel
        if train.prompts_per_step % (train.minibatches * parallel.dp):
            found.append(
                f"train.prompts_per_step: {train.prompts_per_step} does not divide into train.minibatches="
                f"{train.minibatches} x parallel.dp={parallel.dp}; use a multiple of {train.minibatches * parallel.dp}"
            )
        found += parallel.problems(self.model)
        found += self.model.problems()
        found += self._asking_problems()
        found += self._idle_problems()
        found += self._interleaving_problems()
        multiple = self.micro_batch_alignment
        padded = aligned(self.max_sequence_tokens, multiple)
        if padded > train.tokens_per_micro_batch:
            found.append(
                f"train.tokens_per_micro_batch: {train.tokens_per_micro_batch} cannot hold one sequence of "
                "data.max_prompt_tokens + sampling.max_response_tokens"
                + (f", padded to a multiple of {multiple}" if multiple > 1 else "")
                + f"; use at least {padded}"
            )
        found += self.rollout.problems()
        if self.rollout.placement == "dedicated" and self.sync.transport in ("shm", "ipc"):
            found.append(
                f"sync.transport: {self.sync.transport}, but with rollout.placement=dedicated no engine shares memory "
                "with the trainer; use collective, or auto"
            )
        found += self.mismatch.problems()
        found += self._adaptive_problems()
        most = self.vstar.adaptive.most if self.vstar.adaptive else self.vstar.samples_per_prompt
        if (self.vstar.samples_used or 0) > most:
            found.append(
                f"vstar.samples_used: {self.vstar.samples_used} is above the {most} that a prompt has; lower it"
            )
        low, high = self.vstar.success_rate
        if not 0 <= low <= high <= 1:
            found.append(f"vstar.success_rate: [{low}, {high}] is no range within 0 and 1; use 0 <= low <= high <= 1")
        if (low, high) != (0, 1) and self.vstar.filter != "success_rate":
            found.append(
                f"vstar.success_rate: [{low}, {high}] is for vstar.filter=success_rate, and this one is "
                f"{self.vstar.filter}; set that, or leave the range out"
            )
        found += self.optimizer.problems(self.model)
        found += train.problems(self.model, self.optimizer)
        return found

    def sources(self, part: Literal["train", "eval"]) -> list[Source]:
        """Of the prompts to train on, or of those held out, of which there may be none."""
        data, is_held_out = self.data, part == "eval"
        path, several = (data.eval, data.eval_sources) if is_held_out else (data.train, data.train_sources)
        most = self.eval.max_prompts if is_held_out else data.max_prompts
        if path is not None:
            return [Source(f"data.{part}", "data", "", path, data, most, None, self.reward)]
        return [
            Source(
                key := f"data.{part}_sources.{index}",
                key,
                one.name,
                one.path,
                one,
                one.max_prompts or (most if is_held_out else None),
                one.weight,
                one.reward or self.reward,
            )
            for index, one in enumerate(several)
        ]

    @property
    def graders(self) -> list[GraderConfig]:
        """Those of all sources, each once."""
        found: list[GraderConfig] = []
        for source in [*self.sources("train"), *self.sources("eval")]:
            found += [] if source.plain_grader in found else [source.plain_grader]
        return found

    def _asking_problems(self) -> list[str]:
        """A preset that asks for an answer in a form that the reward does not look for."""
        asks = {"gsm8k": "gsm8k", "math": "math", "aime": "math", "openr1": "math", "deepscaler": "math"}
        sources, found = [*self.sources("train"), *self.sources("eval")], []
        for source in sources:
            rows, reward, key = source.rows, source.grader.name, source.rows_key
            own = "reward.name" if source.grader is self.reward else f"{key}.reward.name"
            fitting = asks.get(rows.preset or "")
            if fitting and rows.prompt_format is None and reward != fitting and reward in asks.values():
                found.append(
                    f"{own}: {reward} looks for {_LOOKS_FOR[reward].form}, and {key}.preset={rows.preset} asks for "
                    f"{_LOOKS_FOR[fitting].form}; use {own}={fitting}, or a {key}.prompt_format of your own"
                )
            if reward == "reasoning-gym" and source.task is None:
                found.append(
                    f"{own}: reasoning-gym grades entries of its own tasks, and {source.key} is {source.path}; use "
                    "another reward, or reasoning-gym:TASK"
                )
            if source.task is not None:
                found += self._task_problems(source, own)
            elif rows.options and not any(other.task is not None and other.rows is rows for other in sources):
                found.append(f"{key}.options: {rows.options} are for reasoning-gym:TASK; leave them out")
        return list(dict.fromkeys(found))

    def _task_problems(self, source: Source, reward_key: str) -> list[str]:
        """Of a task, which has columns of its own, and asks for no form of answer by itself."""
        rows, key, reward = source.rows, source.rows_key, source.grader
        found = [
            f"{key}.{name}: {value!r} is for rows of a file, and {source.path} has columns of its own; leave it out"
            for name in ("preset", "prompt_column", "answer_column")
            if (value := getattr(rows, name)) is not None
        ]
        if source.max_prompts is None:
            found.append(
                f"{source.max_prompts_key}: missing, and {source.path} never ends; say how many prompts of it are "
                "wanted"
            )
        looks_for = _LOOKS_FOR.get(reward.name)
        if looks_for and reward.options.get(looks_for.unless_off, True) and rows.prompt_format is None:
            found.append(
                f"{reward_key}: {reward.name} looks for {looks_for.form}, for which {source.path} does not ask; give a "
                f"{key}.prompt_format that does, or use reward reasoning-gym"
            )
        return found

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
            "train.prompts_per_step": (train.prompts_per_step, train.minibatches * parallel.dp),
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

    def _adaptive_problems(self) -> list[str]:
        first, adaptive = self.vstar.samples_per_prompt, self.vstar.adaptive
        if adaptive is None:
            return []
        found = []
        if first > adaptive.most:
            found.append(f"vstar.adaptive.most: {adaptive.most} is below vstar.samples_per_prompt={first}; raise it")
        if adaptive.all_wrong > adaptive.most:
            found.append(
                f"vstar.adaptive.all_wrong: {adaptive.all_wrong} is above vstar.adaptive.most={adaptive.most}; lower it"
            )
        low, high = adaptive.reward_range
        if low >= high:
            found.append(f"vstar.adaptive.reward_range: [{low}, {high}] is empty; give the lowest and highest reward")
        elif not low <= self.reward.failure_reward <= high:
            found.append(
                f"reward.failure_reward: {self.reward.failure_reward} is outside vstar.adaptive.reward_range="
                f"[{low}, {high}]; widen that"
            )
        return found

    @property
    def alignment(self) -> int:
        """Tokens to a multiple of which each sequence is padded, so that every rank can hold its share of it.

        A context-parallel rank holds two equal pieces of each sequence, which tensor-parallel ranks share under
        sequence parallelism. Without packing the sequences are all that can be filled up for `micro_batch_alignment`.
        """
        return self._pieces_per_sequence if self.train.packing else self.micro_batch_alignment

    @property
    def micro_batch_alignment(self) -> int:
        """Tokens to a multiple of which each micro-batch is filled up, so that every rank can compute its share.

        FP8 takes a multiple of the tokens that a rank holds. Under sequence parallelism those are a tensor-parallel
        rank's: Transformer Engine makes them FP8 before it gathers them.
        """
        parallel, fp8 = self.parallel, self.model.fp8
        ranks = parallel.cp * (parallel.tp if parallel.sequence_parallel else 1)
        return math.lcm(self._pieces_per_sequence, fp8.token_multiple * ranks) if fp8 else self._pieces_per_sequence

    @property
    def _pieces_per_sequence(self) -> int:
        """Equal pieces that each sequence is cut into."""
        parallel = self.parallel
        return (2 * parallel.cp if parallel.cp > 1 else 1) * (parallel.tp if parallel.sequence_parallel else 1)

    @property
    def max_sequence_tokens(self) -> int:
        """Longest prompt plus longest response, tokens."""
        return self.data.max_prompt_tokens + self.sampling.max_response_tokens

    @property
    def why_unsaved(self) -> str:
        """What keeps a checkpoint of this training from being read back; empty if one can be."""
        if self.optimizer.cpu_offload:
            return f"optimizer.cpu_offload={self.optimizer.cpu_offload}"
        return "model.fp8.param_gather" if self.model.fp8 and self.model.fp8.param_gather else ""

    def save(self, path: Path) -> None:
        """Write the resolved recipe as YAML that `load_recipe` reads back."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.as_yaml())

    def as_yaml(self) -> str:
        return recipe_text.write(self.model_dump(mode="json"))


def aligned(length: int, multiple: int) -> int:
    """`length` rounded up to a multiple of `multiple`."""
    return -(-length // multiple) * multiple


def shapes() -> list[str]:
    """Names of the public models whose config.json is here."""
    return sorted(path.stem for path in (RECIPES / "shapes").glob("*.json"))


def shape_name(folder: Path) -> str | None:
    """ "qwen3-8b" for shape:qwen3-8b, None for a folder."""
    return str(folder).removeprefix(SHAPE) if str(folder).startswith(SHAPE) else None


def model_config_file(folder: Path) -> Path:
    """The config.json of a Hugging Face folder or of a shape, whether it is there or not."""
    name = shape_name(folder)
    return folder / "config.json" if name is None else RECIPES / "shapes" / f"{name}.json"


def recipe_path(name: str) -> Path:
    """The file of a recipe of this package, e.g. "quickstart". Raises `RecipeError` naming those there are."""
    shipped = {path.stem: path for path in RECIPES.glob("*.yaml")}
    if name not in shipped:
        raise RecipeError([f"recipe: {name} is not a file nor one of the recipes here: {', '.join(sorted(shipped))}"])
    return shipped[name]


def load_recipe(path: Path | str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a YAML recipe (a path, or a name for `recipe_path`) and apply `section.key=value` overrides (YAML values).

    Raises `RecipeError` with every problem, one line each.
    """
    path = Path(path)
    if not path.is_file():
        path = recipe_path(str(path))
    text = path.read_text()
    try:
        tree, misread = recipe_text.read(text)
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError([f"recipe: {path} is not YAML: {' '.join(str(error).split())}"]) from None
    if misread:
        raise RecipeError(misread)
    return build_recipe(tree or {}, overrides)


def build_recipe(tree: Any, overrides: Iterable[str] = ()) -> Recipe:
    """Make a validated `Recipe` of a nested dict and overrides. Raises `RecipeError`."""
    if not isinstance(tree, dict):
        raise RecipeError([f"recipe: the top level is a {type(tree).__name__}; it must map sections to their keys"])
    # An absent section counts as an empty one, so that what is missing is named by its full key.
    tree = {name: {} for name in Recipe.model_fields} | {
        name: {} if section is None else section for name, section in copy.deepcopy(tree).items()
    }
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            problems.append(f"override {override!r}: not of the form section.key=value")
            continue
        value, misread = recipe_text.read_override(key.strip(), text)
        problems += misread
        problem = _set_dotted(tree, key.strip(), value)
        if problem:
            problems.append(problem)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(problems + [_explain(item) for item in error.errors()]) from None
    problems += recipe.problems()
    if problems:
        raise RecipeError(problems)
    return recipe


def describe_fields(model: type[BaseModel] = Recipe, prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted key, default, description) of every field of a recipe, or of the part of it that is `model`."""
    rows = []
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is None or field.description:
            default = "required" if field.is_required() else str(field.get_default(call_default_factory=True))
            rows.append((prefix + name, default, field.description or ""))
        if section or (section := _section_of_list(field.annotation)):
            index = "" if section is _section(field.annotation) else "0."
            rows += describe_fields(section, f"{prefix}{name}.{index}")
    return rows


def fields_marked(name: str) -> dict[str, Any]:
    """The sections ("parallel") and fields ("train.record") that have the mark `name`, and what each is marked with."""
    found: dict[str, Any] = {}
    for section_name, section in Recipe.model_fields.items():
        kind = _section(section.annotation)
        assert kind is not None
        fields = {section_name: section} | {f"{section_name}.{key}": field for key, field in kind.model_fields.items()}
        found |= {key: mark for key, field in fields.items() if (mark := _mark(field, name)) is not None}
    return found


def values_marked(recipe: Recipe, name: str) -> dict[str, Any]:
    """The recipe's values, as JSON has them, of the fields that have the mark `name`, by key."""
    tree = recipe.model_dump(mode="json")
    return {key: tree[section][leaf] for key in fields_marked(name) for section, _, leaf in [key.partition(".")]}


def changed_for_resume(recipe: Recipe, saved: Recipe) -> list[tuple[str, Any, Any]]:
    """(key, value now, value then) of every field that differs and that a resumed run must have the same."""
    allowed = {"may change"} | (
        {"may change at a constant learning rate"} if recipe.optimizer.schedule == "constant" else set()
    )
    free = {key for key, value in fields_marked("resume").items() if value in allowed}
    free_of_source = {key for key, field in SourceConfig.model_fields.items() if _mark(field, "resume") in allowed}

    def kept(value: Any) -> Any:
        """Of a list of sources what must be the same."""
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            return value
        return [{key: part for key, part in one.items() if key not in free_of_source} for one in value]

    now, then = recipe.model_dump(mode="json"), saved.model_dump(mode="json")
    return [
        (f"{section}.{key}", ours, theirs)
        for section in now
        for key in now[section]
        if section not in free and f"{section}.{key}" not in free
        if (ours := kept(now[section][key])) != (theirs := kept(then[section][key]))
    ]


def _mark(field: FieldInfo, name: str) -> Any:
    return field.json_schema_extra.get(name) if isinstance(field.json_schema_extra, dict) else None


def _set_dotted(tree: dict[str, Any], key: str, value: Any) -> str | None:
    *parents, leaf = key.split(".")
    node: Any = tree
    for parent in parents:
        if isinstance(node, list):
            if not (parent.isdigit() and int(parent) < len(node)):
                return f"override {key}: {parent} is none of the {len(node)} there; use 0 to {len(node) - 1}"
            node = node[int(parent)]
        else:
            node = node.setdefault(parent, {})
        if not isinstance(node, dict | list):
            return f"override {key}: {parent} is a value, not a section"
    if isinstance(node, list):
        return f"override {key}: names a whole entry of a list; name a field of it, or give the list"
    node[leaf] = value
    return None


def _section(annotation: Any) -> type[Section] | None:
    """The section that a field is, `Section | None` included."""
    kinds = (annotation, *(() if get_origin(annotation) is list else get_args(annotation)))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


@cache
def _kinds(annotation: Any) -> frozenset[Any]:
    """The types that a field's values, and those within them, may have."""
    inner = get_args(annotation)
    if get_origin(annotation) is Literal:
        return frozenset(type(one) for one in inner)
    return frozenset({annotation}).union(*map(_kinds, inner))


def _section_of_list(annotation: Any) -> type[Section] | None:
    """The section that each of a field's list is."""
    return _section(get_args(annotation)[0]) if get_origin(annotation) is list else None


def _known_keys(parents: list[str]) -> list[str]:
    model: type[Section] = Recipe
    for parent in parents:
        if parent.isdigit():
            continue
        field = model.model_fields.get(parent)
        section = (_section(field.annotation) or _section_of_list(field.annotation)) if field else None
        if section is None:
            return []
        model = section
    return list(model.model_fields)


def _explain(item: Any) -> str:
    """One line for one pydantic error: key, value, allowed, fix."""
    parts = [str(part) for part in item["loc"]]
    key = ".".join(parts)
    kind = item["type"]
    if kind == "extra_forbidden":
        known = _known_keys(parts[:-1])
        near = difflib.get_close_matches(parts[-1], known, n=1)
        hint = f"did you mean {'.'.join(parts[:-1] + near)}?" if near else f"known keys: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if kind == "missing":
        return f"{key}: missing and has no default; set it in the recipe or with {key}=..."
    allowed = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{key}: {item['input']!r} is not allowed; use {allowed}"


assert all(get_args(section.annotation) == () for section in Recipe.model_fields.values()), "sections are plain models"
