"""Checkpoints of a training run: saved every so often, taken up again by the next `train` of the same run folder.

    RUN/checkpoints/step-000050/
      .metadata  *.distcp  common.pt  metadata.json   policy, optimizer and schedule as Megatron-Core's `torch_dist`;
                                                      a critic's beside them, under keys that begin with `critic.`
      model/                                          config.json and tokenizer files, for the way back to Hugging Face
      baseline.parquet                                where the baseline has a state: of each prompt
      checkpoint.json                                 a `Record`: the step, the recipe and the V* store behind it
      files.json                                      size and sha256 of all of these

A resumed run repeats the killed one, bit for bit in the same layout and to rounding in another. The little that goes
from step to step beside the above is in the record (`RunState`). Nothing else has a state: training draws no random
numbers, prompts' order is a function of how many were drawn, the samples' seeds are one of the step, and every rollout
is used in the step that makes it.

A converted model (stages/convert.py) is such a folder as well, with the weights alone.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError

from megatron_apo.config import Recipe, RecipeError, build_recipe, changed_for_resume
from megatron_apo.learner.damage import check_small_files, check_tensors, naming_way_out, saved
from megatron_apo.telemetry.summary import versions
from megatron_apo.telemetry.units import one_line
from megatron_apo.values.store import MANIFEST

if TYPE_CHECKING:
    import torch

    from megatron_apo.data.prompt_source import PromptSource
    from megatron_apo.learner.learner import Learner
    from megatron_apo.learner.optim import Trainable
    from megatron_apo.runtime.topology import Topology
    from megatron_apo.values.baselines import Baseline

Dtype = Literal["fp32", "bf16", "fp16"]
MODEL = "model"
RECORD = "checkpoint.json"
BASELINE = "baseline.parquet"
FORMAT = 1
# What learns, by the names that checkpoints have for it.
POLICY, CRITIC = "policy", "critic"


@dataclass(frozen=True)
class RunState:
    """Where a training run stands: `step` rollout batches learned from."""

    step: int
    recipe: dict[str, Any]
    vstar_sha256: str  # of the V* store's manifest, which has the hash of every shard
    skipped_in_a_row: int = 0  # see `Learner`
    first_mismatches: tuple[float, ...] = ()  # see `MismatchWatch`; JSON keeps every bit of them
    prompts_drawn: int | None = None  # see `PromptSource`; none: as many as each step takes


@dataclass(frozen=True)
class Record:
    """What a folder of Megatron weights is. model_hash: of the Hugging Face tensors, where they are unchanged."""

    dtype: Dtype
    model_hash: str | None = None
    run: RunState | None = None
    format: int = FORMAT
    versions: dict[str, str] = field(default_factory=versions)

    def write(self, folder: Path, source: Path) -> None:
        """Put the record, and configuration and tokenizer of the Hugging Face folder `source`, into `folder`."""
        from megatron_apo.weights.hf_writer import copy_side_files

        (folder / MODEL).mkdir()
        copy_side_files(source, folder / MODEL, torch_dtype(self.dtype))
        (folder / RECORD).write_text(json.dumps(asdict(self), indent=1) + "\n")


def read_record(folder: Path) -> Record:
    """The record of a checkpoint. Raises a ValueError of one line where there is none."""
    path = folder / RECORD
    if not path.is_file():
        raise ValueError(f"{folder}: no {RECORD} there; give a folder that training or convert hf-to-megatron wrote")
    try:
        tree = json.loads(path.read_bytes())
        if isinstance(tree, dict) and tree.get("format") != FORMAT:
            raise ValueError(f"{path}: format {tree.get('format')!r} is not known; this version reads {FORMAT}")
        return TypeAdapter(Record).validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise ValueError(f"{path}: damaged ({where}: {error.errors()[0]['msg']})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged ({one_line(error)})") from None


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype that recipes and records call fp32, bf16 or fp16."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def exported(run_dir: Path) -> Path:
    """Where a finished run leaves its model, as a Hugging Face folder."""
    return run_dir / "checkpoints" / "hf"


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    return next(reversed(saved(run_dir).values()), None)


def next_step(run_dir: Path) -> int:
    """The step (from 0) that `train` takes next in this run: that of its newest checkpoint, or 0."""
    return next(reversed(saved(run_dir)), 0)


def check_resume(recipe: Recipe) -> None:
    """Raise `RecipeError`, one line a field, if the run's newest checkpoint is not of this recipe and V* store, and
    `DamagedCheckpoint` where it is seen to be damaged without its tensors being read."""
    folder = latest(recipe.run.dir)
    if folder is None:
        return
    with naming_way_out(folder):
        run = read_record(folder).run
        check_small_files(folder)
        if run and folder.name != f"step-{run.step:06d}":
            raise ValueError(f"{folder}: {RECORD} is of step {run.step}")
        try:
            theirs = build_recipe(run.recipe) if run else recipe
        except RecipeError as error:
            raise ValueError(
                f"{folder}: the recipe in {RECORD} is none of this version's ({error.problems[0]})"
            ) from None
    if run is None:
        raise ValueError(f"{folder}: a converted model, not a training checkpoint; give another run.dir")
    problems = [
        f"{key}: {ours!r}, but {folder} was trained with {other!r}; set it back or give another run.dir"
        for key, ours, other in changed_for_resume(recipe, theirs)
    ]
    if _store_hash(recipe) != run.vstar_sha256:
        problems.append(f"vstar.dir: {recipe.vstar.dir} is not the store that {folder} was trained with")
    if run.step > recipe.train.steps:
        problems.append(f"train.steps: {recipe.train.steps}, but {folder} is past that; use at least {run.step}")
    if problems:
        raise RecipeError(problems)


def sharded_states(trainables: Mapping[str, Trainable], *, is_loading: bool = False) -> dict[str, Any]:
    """The sharded states of all that learns, as one. Collective.

    The policy's is at the top, as in a checkpoint of it alone; another's is under its name, which begins its keys.
    """
    states = {
        name: trainable.sharded_state(prefix=_prefix(name), is_loading=is_loading)
        for name, trainable in trainables.items()
    }
    return states.pop(POLICY) | states


def load_states(trainables: Mapping[str, Trainable], state: dict[str, Any], folder: Path) -> None:
    """Let each take over its part of `sharded_states`, filled from the checkpoint `folder`."""
    for name, trainable in trainables.items():
        trainable.load_state(state if name == POLICY else state[name], folder, prefix=_prefix(name))


def _prefix(name: str) -> str:
    return "" if name == POLICY else f"{name}."


class Checkpoints:
    """The run's checkpoints, on every rank. prompts, baseline: on the driver, where there is one."""

    def __init__(
        self,
        recipe: Recipe,
        topology: Topology,
        learner: Learner,
        prompts: PromptSource | None = None,
        baseline: Baseline | None = None,
    ):
        self._recipe = recipe
        self._prompts = prompts
        self._baseline = baseline
        self._topology = topology
        self._learner = learner
        self._saved = 0  # the newest there is; what no step has changed is the model

    def restore(self) -> int:
        """Load the newest checkpoint, if there is one. Returns the number of steps already taken. Collective."""
        from megatron_apo.runtime.collective import on_all, on_driver
        from megatron_apo.weights import torch_dist

        folder = self._topology.broadcast(latest(self._recipe.run.dir))
        if folder is None:
            return 0
        run = self._topology.broadcast(_run_of(folder) if self._topology.is_driver else None)
        if self._topology.is_driver:
            print(f"resuming from {folder}", flush=True)
        with naming_way_out(folder):
            check_tensors(folder, self._topology)
            state = torch_dist.read(folder, sharded_states(self._learner.trainables, is_loading=True))
        on_all(self._topology, lambda: load_states(self._learner.trainables, state, folder))
        self._learner.skipped_in_a_row = run.skipped_in_a_row
        self._learner.mismatch.restore(run.first_mismatches)

        def restore_rest() -> None:
            if self._baseline:
                self._baseline.read(folder / BASELINE, run.step)
            if self._prompts:
                drawn = run.prompts_drawn
                self._prompts.restore(run.step * self._recipe.train.prompts_per_step if drawn is None else drawn)

        on_driver(self._topology, restore_rest)
        self._saved = run.step
        return run.step

    def is_due(self, step: int) -> bool:
        """Whether train.save_every asks for a save after `step` steps."""
        every = self._recipe.train.save_every
        return bool(every) and step % every == 0

    def save(self, step: int) -> float | None:
        """Save what `step` steps have made. Collective. Seconds that it took; None where there is nothing to save."""
        from megatron_apo.runtime.collective import on_driver
        from megatron_apo.weights import torch_dist

        start = time.monotonic()
        if step == self._saved:
            return None

        def describe(folder: Path) -> None:
            recipe, learner = self._recipe.model_dump(mode="json"), self._learner
            first_mismatches = tuple(learner.mismatch.first_means)
            drawn = self._prompts.drawn if self._prompts else None
            run = RunState(step, recipe, _store_hash(self._recipe), learner.skipped_in_a_row, first_mismatches, drawn)
            record = Record(self._recipe.model.dtype, run=run)

            def write() -> None:
                record.write(folder, self._recipe.model.path)
                if self._baseline:
                    self._baseline.write(folder / BASELINE)

            on_driver(self._topology, write)

        folder = self._recipe.run.dir / "checkpoints" / f"step-{step:06d}"
        torch_dist.write(folder, self._topology, sharded_states(self._learner.trainables), describe)
        self._saved = step
        return time.monotonic() - start


def _run_of(folder: Path) -> RunState:
    run = read_record(folder).run
    assert run is not None, folder  # `check_resume` refuses it
    return run


def _store_hash(recipe: Recipe) -> str:
    """Empty where training asks for no store, and where there is none."""
    if not recipe.needs_store or not recipe.vstar.is_closed:
        return ""
    return hashlib.sha256((recipe.vstar.dir / MANIFEST).read_bytes()).hexdigest()
