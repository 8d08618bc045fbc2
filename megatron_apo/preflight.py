"""Everything that is refused before work. A command, rank 0 and the doctor ask the same list, so they say the same.

    data = open_training(recipe)        # stage 2's prompts and V*; raises for anything that training would trip over
    problems(recipe, "train")           # the same as lines, for the doctor
    shape_problems(recipe, "train")     # of these what shows without weights, tokenizer and data

Each check is a function of what it reads: the recipe, the `Machine`, a model's config.json. What can be found together
is reported together: machine, models and folders first, then the data, then what depends on both. Starts nothing.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib import util
from pathlib import Path
from typing import Literal

import torch

from megatron_apo.config import Recipe, RecipeError, RolloutConfig, shape_name, values_marked
from megatron_apo.data.presets import demonstration_format
from megatron_apo.data.rendering import PromptRenderer
from megatron_apo.data.sft import Examples, read_examples
from megatron_apo.learner.checkpoint import check_resume, exported, next_step
from megatron_apo.model.hf_config import ModelSpec, check_layout, check_served, read_hf_config
from megatron_apo.model.precision import Layers, check_precision, layer_kind, optimizer_problems
from megatron_apo.model.recompute import check_recompute
from megatron_apo.model.tokenizer import StopIds, load_tokenizer
from megatron_apo.objectives import objective_of
from megatron_apo.rollout.early import begins_with_stage_1, late_because
from megatron_apo.rollout.evaluation import evaluation_job
from megatron_apo.rollout.filling import Filling, SamplingJob
from megatron_apo.rollout.inputs import load_inputs, store_fingerprint
from megatron_apo.rollout.placement import Placement, transport_of
from megatron_apo.rollout.replay import check_replay
from megatron_apo.rollout.server import engine_problems, served_length
from megatron_apo.rollout.training_data import TrainingData
from megatron_apo.rollout.transport.shm import ShmSender, no_room
from megatron_apo.runtime.hosts import is_loopback, route
from megatron_apo.runtime.job import SECRET, given_secret
from megatron_apo.runtime.machine import Machine
from megatron_apo.runtime.telling import tell_once
from megatron_apo.telemetry.units import data_size
from megatron_apo.telemetry.weights_and_biases import wandb_problems
from megatron_apo.values.store import StoreWriter, VStarStore, is_whole
from megatron_apo.weights.hf_io import HFReader
from megatron_apo.weights.plan import Plan
from megatron_apo.weights.whole_folder import check_empty

Stage = Literal["warmup", "estimate-vstar", "train", "evaluate", "serve"]
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp32": 4, "bf16": 2}  # of a number, as recipes name its type


def open_warmup(recipe: Recipe, machine: Machine | None = None) -> Examples:
    """The warm start's pairs. Raises `ValueError`, a line for each problem, as all of these do."""
    warmup = recipe.warmup
    if warmup.data is None or warmup.start is None:
        raise ValueError("warmup.data and warmup.start: both are needed for a warm start; set them in the recipe")
    start = warmup.start
    _refuse_shapes(recipe.model.folders | {"warmup.start": start})
    _raise(
        training_problems(recipe, {"warmup.start": start}, machine or Machine.here()),
        lambda: HFReader(start).check(read_hf_config(start)),
        lambda: check_empty(recipe.model.path, "model.path (the warm start writes it)"),
    )
    return warmup_examples(recipe)


def warmup_examples(recipe: Recipe) -> Examples:
    """`warmup.data`, rendered and tokenized."""
    start = recipe.warmup.start
    assert start is not None
    renderer = PromptRenderer(load_tokenizer(start, "warmup.start"), recipe.data, demonstration_format(recipe))
    stop = StopIds.of(recipe, start, renderer)
    examples = read_examples(recipe, renderer, stop.ids)
    tell_once(stop.note)
    return examples


def check_sampling(recipe: Recipe, machine: Machine | None = None) -> None:
    """What stage 1's engine needs of machine and reference."""
    _refuse_shapes(recipe.model.folders)
    _raise(_stage_1_problems(recipe, machine or Machine.here()))


def _stage_1_problems(recipe: Recipe, machine: Machine) -> list[str]:
    key = "model.reference" if recipe.model.reference else "model.path"
    return _offline_problems(recipe, {key: recipe.model.reference_path}, machine)


def _offline_problems(recipe: Recipe, models: Mapping[str, Path], machine: Machine) -> list[str]:
    """Of engines within workers."""
    offline = [
        f"rollout.{name}: {value!r} is for a server, and this command's workers have vLLM in their own process; leave "
        "it out"
        for name in ("python", "extra_args")
        if (value := getattr(recipe.rollout, name))
    ]
    return offline + sampling_problems(recipe, models, machine)


def open_sampling(recipe: Recipe) -> SamplingJob:
    """Stage 1's prompts, and the store that it fills."""
    _refuse_shapes(recipe.model.folders)
    inputs = load_inputs(recipe)
    vstar, prompts, settings = recipe.vstar, inputs.training.prompts, values_marked(recipe, "shards")
    num_shards = -(-len(prompts) // vstar.prompts_per_shard)
    store = Filling(
        StoreWriter(vstar.dir, store_fingerprint(recipe, inputs), num_shards, settings),
        prompts,
        vstar.prompts_per_shard,
        inputs.sampling(recipe.sampling),
        vstar.adaptive,
        vstar.keep_responses,
    )
    tell_once(inputs.stop_note)
    title = "V*: sampling the reference"
    model = recipe.model.reference_path
    return SamplingJob(recipe, inputs, model, vstar.dir, (store,), vstar.prefix_caching, title).checked()


def check_training(recipe: Recipe, machine: Machine | None = None) -> None:
    """What `train` needs before its ranks start: all that `open_training` does, or where training begins with stage 1
    what that needs."""
    if not begins_with_stage_1(recipe):
        open_training(recipe, machine)
        return
    machine = machine or Machine.here()
    _refuse_shapes(recipe.folders)
    late = late_because(recipe, has_gpus=bool(machine.gpus))
    found = [f"vstar.at_start: true, but {line}; run estimate-vstar before" for line in late]
    _raise(found + _run_problems(recipe, machine))
    open_sampling(recipe)
    check_resume(recipe)


def open_training(recipe: Recipe, machine: Machine | None = None) -> TrainingData:
    """Stage 2's prompts and, where training asks for it, their V* from a store that is proven to be this run's."""
    _refuse_shapes(recipe.folders)
    _raise(_run_problems(recipe, machine or Machine.here()))
    inputs = load_inputs(recipe)
    store = None
    if recipe.needs_store:
        store = VStarStore.open(recipe.vstar.dir, recipe.vstar.samples_used)
        store.check(store_fingerprint(recipe, inputs))
    check_resume(recipe)
    data = TrainingData.of(recipe, inputs, store)
    check_replay(recipe, next_step(recipe.run.dir), data.vstar)
    tell_once(inputs.stop_note)
    return data


def check_serving(recipe: Recipe, engines: int | None = None, machine: Machine | None = None) -> None:
    """What `megatron-apo serve` needs: a training that takes dedicated engines, and room for `engines` here."""
    _refuse_shapes(recipe.model.folders)
    _raise(_serving_problems(recipe, engines, machine or Machine.here()))


def _serving_problems(recipe: Recipe, engines: int | None, machine: Machine) -> list[str]:
    rollout, found = recipe.rollout, []
    if rollout.placement != "dedicated":
        found.append(
            "rollout.placement: colocated, whose engines the trainer's own processes start; use dedicated in its recipe"
        )
    found += [] if machine.is_described else _secret_problems()
    found += sampling_problems(recipe, {"model.path": recipe.model.path}, machine)
    num_gpus = len(machine.gpus)
    if engines and rollout.tp <= num_gpus < engines * rollout.tp:
        found.append(
            f"--engines: {engines} of rollout.tp={rollout.tp} need {engines * rollout.tp} GPUs, and here are "
            f"{num_gpus}; use at most {num_gpus // rollout.tp}"
        )
    return found


def _secret_problems(is_needed: bool = True) -> list[str]:
    """Of a job; it is needed where its parts are started apart from each other."""
    secret = given_secret()
    if secret is None and not is_needed:
        return []
    if secret and secret.isascii() and secret.isprintable():
        return []
    what = "has other than ASCII's printable characters" if secret else "not set"
    return [
        f"{SECRET}: {what}; dedicated engines and the trainer must share a secret: set it for both, to something long "
        'and random, such as `python -c "import secrets; print(secrets.token_urlsafe(32))"` prints'
    ]


def _ipc_problems() -> list[str]:
    """Other processes open no memory of an allocator that maps it piece by piece."""
    return [
        f"{name}: {os.environ[name]}, of whose memory sync.transport=ipc can share none; leave expandable_segments "
        "out, or use shm"
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
        if "expandable_segments:true" in os.environ.get(name, "").lower()
    ]


def _driver_problems(rollout: RolloutConfig) -> list[str]:
    """Of the address where rank 0 takes engines in. Debian's /etc/hosts has a host's own name at 127.0.1.1."""
    host = (rollout.driver or "").rpartition(":")[0].strip("[]")
    own = route(host)
    if not own:
        return [f"rollout.driver: {host} is not known here; give an address of this machine that the others reach"]
    if is_loopback(own) and host not in ("localhost", own):
        return [
            f"rollout.driver: {host} is {own} on this machine, which no other reaches; give an address by which they do"
        ]
    return []


def check_evaluation(recipe: Recipe, machine: Machine | None = None) -> None:
    """What the engine of an evaluation's worker needs of machine and model."""
    _refuse_shapes({"model.path": recipe.model.path})
    missing = [] if recipe.sources("eval") else ["data.eval: missing; give held-out prompts to evaluate on"]
    _raise(missing + _evaluation_problems(recipe, machine or Machine.here()))


def _evaluation_problems(recipe: Recipe, machine: Machine) -> list[str]:
    return _offline_problems(recipe, {"model.path": recipe.model.path}, machine)


def open_evaluation(recipe: Recipe) -> SamplingJob:
    """The held-out prompts of `model.path`, by its own tokenizer, and the stores that are filled with its samples."""
    _refuse_shapes({"model.path": recipe.model.path})
    inputs = load_inputs(recipe)
    job = evaluation_job(recipe, inputs).checked()
    tell_once(inputs.stop_note)
    return job


def check_job(recipe: Recipe, stages: Sequence[str], machine: Machine) -> None:
    """What any of these stages, which are done one after the other, would refuse before its work; of data and of a
    store that is to be made, nothing yet. Raises `RecipeError`."""
    _refuse_shapes(recipe.model.folders)
    found = _run_problems(recipe, machine) if "train" in stages else []
    if "estimate-vstar" in stages:
        found += new_lines(_stage_1_problems(recipe, machine), known=found)
    if "evaluate" in stages:
        found += new_lines(_evaluation_problems(recipe, machine), known=found)
    _raise(found)
    if "train" in stages and (is_whole(recipe.vstar.dir) or not recipe.needs_store):
        check_resume(recipe)


def problems(recipe: Recipe, stage: Stage, machine: Machine | None = None) -> list[str]:
    """What `megatron-apo STAGE` would say of this recipe before any work; nothing if it would start."""
    machine = machine or Machine.here()

    def estimate_vstar() -> None:
        check_sampling(recipe, machine)
        open_sampling(recipe)

    def evaluate() -> None:
        check_evaluation(recipe, machine)
        open_evaluation(recipe)

    checks: dict[Stage, Callable[[], object]] = {
        "warmup": lambda: open_warmup(recipe, machine),
        "estimate-vstar": estimate_vstar,
        "train": lambda: check_training(recipe, machine),
        "evaluate": evaluate,
        "serve": lambda: check_serving(recipe, machine=machine),
    }
    return lines_of([checks[stage]])


def shape_problems(recipe: Recipe, stage: Stage | None = None, machine: Machine | None = None) -> list[str]:
    """What `megatron-apo STAGE` (None: stages 1 and 2) would say of recipe, machine and the models' config.json alone,
    where they have no more: weights, tokenizer, data and store are not looked at."""
    machine = machine or Machine.here()
    found: list[str] = []
    if stage in (None, "warmup", "train"):
        models = recipe.model.folders if stage == "warmup" else _training_models(recipe)
        found += training_problems(recipe, models, machine)
    if stage == "estimate-vstar" or (stage is None and recipe.needs_store):
        found += new_lines(_stage_1_problems(recipe, machine), known=found)
    if stage == "evaluate":
        found += _evaluation_problems(recipe, machine)
    if stage == "serve":
        found += _serving_problems(recipe, None, machine)
    return found


def _refuse_shapes(models: Mapping[str, Path]) -> None:
    """Raise for a model that is no more than a config.json, before anything else is looked at."""
    _raise(
        [
            f"{key}: {folder} has no weights, it is for `megatron-apo doctor` alone; give a Hugging Face folder"
            for key, folder in models.items()
            if shape_name(folder) is not None
        ]
    )


def next_stage(recipe: Recipe) -> Stage:
    """The first stage whose outcome is not there yet."""
    if recipe.warmup.data is not None and not recipe.model.path.exists():
        return "warmup"
    has_no_stage_1 = recipe.vstar.is_closed or not recipe.needs_store or recipe.vstar.at_start
    return "train" if has_no_stage_1 else "estimate-vstar"


def training_problems(recipe: Recipe, models: Mapping[str, Path], machine: Machine) -> list[str]:
    """What keeps a valid recipe from training on this machine, one line each.

    models: key of the recipe -> the Hugging Face folder there, of which only config.json is read.
    """
    parallel, gpus, found = recipe.parallel, machine.gpus, []
    layers: Layers = "local"
    try:
        layers = layer_kind(recipe.model, parallel, machine.capability, elsewhere=machine.is_described)
    except RecipeError as error:
        found += error.problems
    for prefix, optimizer in recipe.optimizers.items():
        lines = optimizer_problems(optimizer, machine.capability, elsewhere=machine.is_described)
        found += [f"{prefix}{line}" for line in lines]
    if machine.is_described:
        found += _nodes_problems(recipe, machine)
    if gpus and parallel.world_size > len(gpus) and machine.ranks_here is None:
        found.append(
            f"parallel.dp: tp={parallel.tp} x pp={parallel.pp} x cp={parallel.cp} x dp={parallel.dp} is "
            f"{parallel.world_size} ranks, and here are {len(gpus)} GPUs; use a smaller layout, or start the ranks on "
            "several machines with torchrun"
        )
    if recipe.train.replay is None:
        if recipe.rollout.placement == "colocated":
            found += [] if machine.is_described else _secret_problems(is_needed=False)
            found += sampling_problems(recipe, models, machine) + _replicas_problems(recipe.rollout, machine)
            at_once = {"train.streamed": recipe.train.streamed, "eval.overlapped": recipe.eval.overlapped}
            found += [
                f"{key}: true, but colocated engines have the ranks' GPUs, which would compute for both at once; use "
                "false, or rollout.placement=dedicated"
                for key, is_set in at_once.items()
                if is_set and gpus
            ]
        elif machine.is_described:
            found += sampling_problems(recipe, models, machine)
        else:
            found += _secret_problems() + _driver_problems(recipe.rollout)
        try:
            is_ipc = gpus and _transport(recipe, machine) == "ipc"
            found += _ipc_problems() if is_ipc and not machine.is_described else []
        except ValueError as error:
            found.append(str(error))
    checks = (
        lambda spec, _: check_layout(spec, parallel),
        lambda spec, _: check_precision(spec, parallel, recipe.model.fp8),
        lambda spec, _: check_recompute(spec, parallel, recipe.train, layers),
        lambda spec, _: _check_host_memory(spec, recipe, machine),
        lambda spec, _: _check_sync_room(spec, recipe, machine),
    )
    found += _of_models(models, checks, known=found)
    return found if machine.is_described else found + wandb_problems(recipe.telemetry.wandb)


def sampling_problems(recipe: Recipe, models: Mapping[str, Path], machine: Machine) -> list[str]:
    """`training_problems` of vLLM alone."""
    rollout, gpus = recipe.rollout, machine.gpus
    on_gpu = bool(gpus) if machine.is_described else None
    found = [] if machine.is_described else _interpreter_problems(rollout)
    found += engine_problems(rollout, on_gpu)
    if gpus and rollout.tp > len(gpus):
        found.append(
            f"rollout.tp: {rollout.tp} workers, and here are {len(gpus)} GPUs; use at most as many, or name "
            "more in CUDA_VISIBLE_DEVICES"
        )
    checks = (
        lambda spec, _: check_served(spec),
        lambda spec, _: _check_engine(spec, rollout.tp),
        lambda spec, _: _check_engine_memory(spec, rollout, machine),
        lambda _, folder: served_length(rollout, folder, recipe.max_sequence_tokens, on_gpu),
    )
    return found + _of_models(models, checks, known=found)


def _nodes_problems(recipe: Recipe, machine: Machine) -> list[str]:
    """Whether the nodes that were described are enough for the ranks, and for dedicated engines beside them."""
    rollout, world_size = recipe.rollout, recipe.parallel.world_size
    gpus, nodes = len(machine.gpus), machine.described_nodes
    left = nodes - -(-world_size // gpus)
    if left < 0:
        return [
            f"parallel.dp: {world_size} ranks (tp x pp x cp x dp), and {nodes} x {gpus} GPUs are {nodes * gpus}; use a "
            f"smaller layout, or at least {nodes - left} nodes"
        ]
    room = left * (gpus // rollout.tp)
    is_dedicated = recipe.train.replay is None and rollout.placement == "dedicated"
    if is_dedicated and rollout.tp <= gpus and rollout.replicas > room:
        return [
            f"rollout.replicas: {rollout.replicas} dedicated engines of rollout.tp={rollout.tp}, and {left} nodes "
            f"without ranks have room for {room}; use fewer, or more nodes"
        ]
    return []


def _replicas_problems(rollout: RolloutConfig, machine: Machine) -> list[str]:
    num_gpus, here = len(machine.gpus), len(_placement(rollout, machine).here)
    if rollout.tp <= num_gpus < here * rollout.tp:
        where = "here are" if machine.num_nodes == 1 else f"each of {machine.num_nodes} nodes has"
        return [
            f"rollout.replicas: {rollout.replicas} engines of rollout.tp={rollout.tp} need "
            f"{here * rollout.tp} GPUs{' of a node' if machine.num_nodes > 1 else ''}, and {where} {num_gpus}; use at "
            f"most {num_gpus // rollout.tp * machine.num_nodes}, or name more in CUDA_VISIBLE_DEVICES"
        ]
    return []


def _placement(rollout: RolloutConfig, machine: Machine) -> Placement:
    """Of a job on nodes like this one, which is the first."""
    return Placement.of(rollout, [str(node) for node in range(machine.num_nodes)])


def _transport(recipe: Recipe, machine: Machine) -> str:
    return transport_of(recipe, _placement(recipe.rollout, machine), on_gpu=bool(machine.gpus))


def _interpreter_problems(rollout: RolloutConfig) -> list[str]:
    """Where vLLM is."""
    if rollout.python and not shutil.which(rollout.python):
        return [f"rollout.python: {rollout.python} is not an interpreter on this machine; name one that has vLLM"]
    if not rollout.python and not util.find_spec("vllm"):
        return ["rollout.python: vLLM is not installed here; name an interpreter that has it"]
    return []


def _run_problems(recipe: Recipe, machine: Machine) -> list[str]:
    """Policy, reference, the run's folder and what is written there."""
    models = _training_models(recipe)
    found = training_problems(recipe, models, machine)
    specs: list[ModelSpec] = []

    def check_weights(folder: Path) -> None:
        spec = read_hf_config(folder)
        specs.append(spec)
        HFReader(folder).check(spec)

    found += lines_of((partial(check_weights, folder) for folder in models.values()), known=found)
    if len(specs) == 2:
        found += _differences("model.reference", "the reference", *reversed(specs))
    found += lines_of([partial(_check_critic, recipe)], known=found)
    out = exported(recipe.run.dir)
    if out.exists():
        found.append(f"run.dir: {out} is there already; give another run.dir, or remove it")
    if not recipe.sources("eval") and recipe.train.replay is None:
        found.append("data.eval: missing; training reports on held-out prompts")
    return found


def _training_models(recipe: Recipe) -> dict[str, Path]:
    """Policy and reference by their keys; the policy alone where neither the method nor a V* store has to do with the
    reference."""
    is_read = recipe.needs_store or objective_of(recipe).needs_reference
    return recipe.model.folders if is_read else {"model.path": recipe.model.path}


def _check_critic(recipe: Recipe) -> None:
    """A critic has the policy's layers; its embedding is its own, and its head may be there or not."""
    config = recipe.objective.own_critic
    if config is None or config.path is None:
        return
    path = config.path
    if lines := [f"{line} (objective.critic.path)" for line in lines_of([lambda: read_hf_config(path)])]:
        raise ValueError("\n".join(lines))
    own, policy = (read_hf_config(folder).as_critic() for folder in (path, recipe.model.path))
    if lines := _differences("objective.critic.path", "the critic", own, policy):
        raise ValueError("\n".join(lines))
    HFReader(path).check(own)


def _differences(key: str, which: str, own: ModelSpec, policy: ModelSpec) -> list[str]:
    """What keeps the model of a key from being the policy's with other weights, one line each."""
    theirs = asdict(policy)
    return [
        f"{key}: {name} is {value!r}, but {theirs[name]!r} in model.path; {which} must be the same model with other "
        "weights"
        for name, value in asdict(own).items()
        if theirs[name] != value
    ]


def _raise(found: Sequence[str], *checks: Callable[[], object]) -> None:
    """Raise `RecipeError` with what was found and what the checks refuse, if there is anything."""
    if found := [*found, *lines_of(checks, known=found)]:
        raise RecipeError(found)


def lines_of(checks: Iterable[Callable[[], object]], known: Sequence[str] = ()) -> list[str]:
    """What the checks raise `ValueError` for, one line each, without what is within a line of `known` or before."""
    found: list[str] = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            found += new_lines(str(error).splitlines(), known=(*known, *found))
    return found


def new_lines(lines: Iterable[str], known: Sequence[str]) -> list[str]:
    """Those that are within no line of `known`."""
    return [line for line in lines if not any(line in other for other in known)]


def _of_models(
    models: Mapping[str, Path], checks: Sequence[Callable[[ModelSpec, Path], object]], known: Sequence[str]
) -> list[str]:
    """What the checks refuse of each model that can be read, or why it cannot, with the key that names it."""
    found: list[str] = []
    for key, folder in models.items():

        def check_all(folder: Path = folder) -> None:
            spec = read_hf_config(folder)
            if lines := lines_of(partial(check, spec, folder) for check in checks):
                raise ValueError("\n".join(lines))

        found += [f"{line} ({key})" for line in lines_of([check_all], known=[*known, *found])]
    return found


def _check_engine(spec: ModelSpec, tp: int) -> None:
    """By vLLM's own conditions (config/model.py, and the attention of each family in model_executor/models)."""
    if spec.num_heads % tp:
        raise ValueError(f"rollout.tp: {tp} does not divide the model's {spec.num_heads} heads; use a divisor")
    groups = spec.num_query_groups
    if groups % tp and tp % groups:
        fits = [size for size in range(1, spec.num_heads + 1) if _tp_fits(spec, size)]
        raise ValueError(f"rollout.tp: {tp} and the model's {groups} KV heads do not divide; use one of {fits}")


def _tp_fits(spec: ModelSpec, tp: int) -> bool:
    return not spec.num_heads % tp and not (spec.num_query_groups % tp and tp % spec.num_query_groups)


def _check_engine_memory(spec: ModelSpec, rollout: RolloutConfig, machine: Machine) -> None:
    """Weights and KV cache alone are held against a GPU; what else vLLM and the trainer need is not known before."""
    if not machine.gpus:
        return
    room = min(machine.gpu_memory_bytes[: rollout.tp])
    weights = spec.num_weights * (1 if rollout.quantization else _BYTES[rollout.dtype]) // rollout.tp
    if weights + rollout.kv_cache_gib * 2**30 > room:
        most = math.floor((room - weights) / 2**30 * 100) / 100
        raise ValueError(
            f"rollout.kv_cache_gib: {rollout.kv_cache_gib:g} beside {data_size(weights)} of weights does not fit a GPU "
            f"of {data_size(room)}; use {f'less than {most:g}, or ' if most > 0 else ''}a larger rollout.tp"
        )


def _check_sync_room(spec: ModelSpec, recipe: Recipe, machine: Machine) -> None:
    """Where the buckets of a sync lie."""
    if recipe.train.replay is not None or _transport(recipe, machine) != "shm":
        return
    parallel = recipe.parallel
    dtype = torch.float32 if recipe.model.dtype == "fp32" else torch.bfloat16
    plan = Plan.of(spec, dtype, recipe.sync.bucket_mib * 2**20, pp=parallel.pp, ep=parallel.ep, vpp=parallel.vpp)
    needed, room = ShmSender(plan).num_bytes, machine.room(recipe.sync.dir)
    if needed > room:
        raise ValueError(no_room(recipe.sync.dir or Path("/dev/shm"), needed, room))


def _check_host_memory(spec: ModelSpec, recipe: Recipe, machine: Machine) -> None:
    """What leaves this machine's GPUs has to go somewhere; on a CPU nothing leaves."""
    if not machine.gpus:
        return
    model, parallel = recipe.model, recipe.parallel
    replicas = parallel.dp * parallel.cp
    held = (spec.num_weights - spec.num_expert_weights) * replicas + spec.num_expert_weights * replicas // parallel.ep
    ranks_here = machine.ranks_here or min(parallel.world_size, len(machine.gpus))
    here = ranks_here / parallel.world_size
    needs = {}
    if recipe.train.offload_while_sampling:
        needs["train.offload_while_sampling: true"] = sum(
            (2 * _BYTES[optimizer.moments] + (4 if model.dtype == "bf16" else 0))
            * (1 - optimizer.cpu_offload)
            * (spec.num_weights if optimizer.distributed else held)
            * here
            for optimizer in recipe.optimizers.values()  # a critic is as large as the policy, but for its head
        )
    if model.reference_mode != "resident" and objective_of(recipe).needs_reference:
        # In swap the policy's weights wait as well.
        copies = 2 if model.reference_mode == "swap" else 1
        needs[f"model.reference_mode: {model.reference_mode}"] = copies * held * _BYTES[model.dtype] * here
    if recipe.rollout.sleep_while_training and recipe.train.replay is None:
        needs["rollout.sleep_while_training: true"] = (
            len(_placement(recipe.rollout, machine).here) * spec.num_weights * _BYTES[recipe.rollout.dtype]
        )
    available = machine.available_bytes
    if sum(needs.values()) > available:
        parts = ", ".join(f"{setting} ({data_size(size)})" for setting, size in needs.items())
        raise ValueError(
            f"{parts} would wait in this machine's memory, of which {data_size(available)} are available; leave one "
            "out, or use a machine with more"
        )
