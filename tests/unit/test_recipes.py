"""The recipes for GPUs, each against the machine that its first lines name, and the shapes of public models."""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path

import pytest

from megatron_apo.config import RECIPES, Recipe, load_recipe, shape_name, shapes
from megatron_apo.model.hf_config import check_served, read_hf_config
from megatron_apo.preflight import Stage, shape_problems
from megatron_apo.runtime.machine import Machine
from megatron_apo.weights.families import hf_tensors

# Parameters in billions: the model cards', and what the hub counts in the weights of those whose card has none.
PARAMETERS = {
    "llama-3.1-8b": 8.03,
    "qwen2.5-1.5b": 1.54,
    "qwen2.5-3b": 3.09,
    "qwen2.5-7b": 7.61,
    "qwen2.5-math-1.5b": 1.54,
    "qwen2.5-math-7b": 7.61,
    "qwen3-235b-a22b": 235,
    "qwen3-30b-a3b": 30.5,
    "qwen3-32b": 32.8,
    "qwen3-8b": 8.2,
    "r1-distill-qwen-1.5b": 1.78,
    "r1-distill-qwen-7b": 7.62,
}
WITHOUT_EMBEDDINGS = {"qwen2.5-1.5b": 1.31, "qwen2.5-3b": 2.77, "qwen2.5-7b": 6.53, "qwen3-8b": 6.95, "qwen3-32b": 31.2}
# What a config.json without a tokenizer's help must tell: (longest sequence, base of the rotary embedding, EOS id).
POSITIONS = {
    "llama-3.1-8b": (131072, 5e5, 128001),
    "qwen2.5-1.5b": (131072, 1e6, 151643),
    "qwen2.5-3b": (32768, 1e6, 151643),
    "qwen2.5-7b": (131072, 1e6, 151643),
    "qwen2.5-math-1.5b": (4096, 1e4, 151643),
    "qwen2.5-math-7b": (4096, 1e4, 151643),
    "r1-distill-qwen-1.5b": (131072, 1e4, 151643),
    "r1-distill-qwen-7b": (131072, 1e4, 151643),
} | {name: (40960, 1e6, 151645) for name in PARAMETERS if name.startswith("qwen3-")}

FOR_GPUS = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem not in ("quickstart", "smollm2-sums"))
DATA = ["data.train=prompts.jsonl", "data.eval=held_out.jsonl"]
SLEEPLESS = ["rollout.sleep_while_training=false"]


def shape(name: str) -> Path:
    return Path(f"shape:{name}")


def load(name: str, *overrides: str) -> Recipe:
    return load_recipe(name, [*DATA, *overrides])


def machine(recipe: Recipe, nodes: int, gpus: int, gpu: str, **known: int) -> Machine:
    return Machine.described(gpu, gpus, nodes, num_ranks=recipe.parallel.world_size, **known)


def own_machine(name: str) -> tuple[int, int, str]:
    """(nodes, GPUs of each, which) of the command in the recipe's first lines."""
    text = (RECIPES / f"{name}.yaml").read_text()
    (found,) = re.findall(rf"doctor -r {re.escape(name)} --nodes (\d+) --gpus (\d+) --gpu (\S+) data", text)
    return int(found[0]), int(found[1]), found[2]


def problems(name: str, *overrides: str, nodes: int | None = None, gpu: str | None = None, **known: int) -> list[str]:
    """What is wrong with a recipe on its own machine, or on one with other nodes or GPUs."""
    recipe = load(name, *overrides)
    own_nodes, gpus, own_gpu = own_machine(name)
    return shape_problems(recipe, None, machine(recipe, nodes or own_nodes, gpus, gpu or own_gpu, **known))


def test_there_is_a_shape_for_each_model_of_the_table() -> None:
    assert shapes() == sorted(PARAMETERS) == sorted(POSITIONS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shape_has_the_models_parameters(name: str) -> None:
    spec = read_hf_config(shape(name))
    check_served(spec)
    tensors = hf_tensors(spec)
    assert sum(map(prod, tensors.values())) == pytest.approx(PARAMETERS[name] * 1e9, rel=0.01)
    assert spec.num_weights == pytest.approx(PARAMETERS[name] * 1e9, rel=0.01)
    if name in WITHOUT_EMBEDDINGS:
        counted = sum(prod(size) for key, size in tensors.items() if "embed_tokens" not in key and "lm_head" not in key)
        assert counted == pytest.approx(WITHOUT_EMBEDDINGS[name] * 1e9, rel=0.01)


@pytest.mark.parametrize("name", POSITIONS)
def test_a_shape_has_the_models_positions_and_end(name: str) -> None:
    longest, theta, end = POSITIONS[name]
    spec = read_hf_config(shape(name))
    config = json.loads((RECIPES / "shapes" / f"{name}.json").read_text())
    assert (spec.max_positions, spec.rope.theta, config["eos_token_id"]) == (longest, theta, end)
    assert (spec.rope.kind, spec.rope.factor) == (("llama3", 8.0) if name == "llama-3.1-8b" else ("default", 1.0))


@pytest.mark.parametrize("name", PARAMETERS)
def test_transformers_reads_a_shape_alike(name: str) -> None:
    """By its own configuration classes, which know what a config.json leaves out."""
    from transformers import AutoConfig

    tree = json.loads((RECIPES / "shapes" / f"{name}.json").read_text())
    config = AutoConfig.for_model(**tree)
    spec = read_hf_config(shape(name))
    assert (config.num_attention_heads, config.num_key_value_heads) == (spec.num_heads, spec.num_query_groups)
    assert getattr(config, "head_dim", None) in (None, spec.head_dim)
    assert (config.rms_norm_eps, config.initializer_range) == (spec.norm_eps, spec.initializer_range)
    assert config.tie_word_embeddings == spec.tied and config.rope_parameters["rope_theta"] == spec.rope.theta


def test_the_recipes_for_gpus() -> None:
    assert FOR_GPUS == [
        "qwen2.5-1.5b-math",
        "qwen2.5-7b-math",
        "qwen3-30b-a3b",
        "qwen3-32b-16k",
        "qwen3-8b-16k",
        "r1-distill-qwen-1.5b-16k",
        "r1-distill-qwen-7b-16k",
    ]


@pytest.mark.parametrize("name", FOR_GPUS)
def test_a_recipe_fits_the_machine_that_it_names(name: str) -> None:
    assert shape_name(load(name).model.path) in PARAMETERS
    assert problems(name) == []


@pytest.mark.parametrize("name", FOR_GPUS)
def test_a_recipe_uses_its_whole_machine(name: str) -> None:
    recipe, (nodes, gpus, _) = load(name), own_machine(name)
    assert recipe.parallel.world_size == recipe.rollout.replicas * recipe.rollout.tp == nodes * gpus


@pytest.mark.parametrize("name", FOR_GPUS)
def test_an_engine_holds_its_share_of_a_step_at_full_length(name: str) -> None:
    """Else a step whose responses are all long would be sampled in parts. Bytes of keys and values by hand."""
    recipe = load(name)
    spec, rollout = read_hf_config(recipe.model.path), recipe.rollout
    a_token = 2 * spec.num_layers * max(1, spec.num_query_groups // rollout.tp) * spec.head_dim * 2
    share = recipe.train.prompts_per_step // rollout.replicas
    assert share <= rollout.max_num_seqs
    assert share * recipe.max_sequence_tokens * a_token <= rollout.kv_cache_gib * 2**30


@pytest.mark.parametrize("name", FOR_GPUS)
def test_the_methods_numbers_are_the_papers(name: str) -> None:
    recipe = load(name)
    assert (recipe.vstar.beta1, recipe.objective.beta2, recipe.vstar.samples_per_prompt) == (0.5, 1e-3, 8)
    assert (recipe.train.prompts_per_step, recipe.train.minibatches, recipe.optimizer.lr) == (256, 2, 1e-6)
    assert (recipe.sampling.temperature, recipe.objective.loss_scale) == (1, "paper")
    if name.endswith("math"):
        assert (recipe.data.max_prompt_tokens, recipe.sampling.max_response_tokens) == (256, 1024)
        assert recipe.train.steps == 25 * (7500 // 256)


WRONG = [
    ("qwen3-8b-16k", ["rollout.tp=3"], "rollout.tp: 3 does not divide the model's 32 heads"),
    (
        "r1-distill-qwen-7b-16k",
        ["rollout.tp=7", "rollout.replicas=1"],
        "rollout.tp: 7 and the model's 4 KV heads do not divide; use one of [1, 2, 4, 28]",
    ),
    ("r1-distill-qwen-7b-16k", ["parallel.tp=7", "parallel.dp=1"], "parallel.tp: 7 does not fit 28 heads in 4 query"),
    ("r1-distill-qwen-7b-16k", ["rollout.kv_cache_gib=73"], "rollout.kv_cache_gib: 73 beside 7.62 GB of weights does"),
    ("qwen3-32b-16k", ["rollout.tp=1", "rollout.replicas=128"], "rollout.kv_cache_gib: 20 beside 65.52 GB of weights"),
    ("qwen3-32b-16k", ["parallel.dp=32"], "parallel.dp: 256 ranks (tp x pp x cp x dp), and 16 x 8 GPUs are 128; use a"),
    (
        "qwen3-8b-16k",
        ["rollout.replicas=17"],
        "rollout.replicas: 17 engines of rollout.tp=2 need 10 GPUs of a node, and each of 4 nodes has 8; use at most",
    ),
    ("qwen3-30b-a3b", ["parallel.tp=2", "parallel.dp=16"], "parallel.tp: 2, but Megatron-Core trains a mixture of"),
    ("qwen3-30b-a3b", ["parallel.ep=32", "rollout.tp=16"], "rollout.tp: 16 workers, and here are 8 GPUs; use at most"),
    ("qwen3-32b-16k", ["parallel.pp=3"], "parallel.dp: 384 ranks (tp x pp x cp x dp), and 16 x 8 GPUs are 128; use a"),
    (
        "qwen2.5-7b-math",
        ["model.path=shape:qwen2.5-math-7b", "sampling.max_response_tokens=4096"],
        "data.max_prompt_tokens + sampling.max_response_tokens: 4352, but shape:qwen2.5-math-7b has",
    ),
]


@pytest.mark.parametrize(("name", "overrides", "start"), WRONG)
def test_a_recipe_that_does_not_fit_is_refused(name: str, overrides: list[str], start: str) -> None:
    assert [line for line in problems(name, *overrides) if line.startswith(start)] != []


def test_a_machine_that_is_too_small_is_refused() -> None:
    (line,) = problems("qwen3-8b-16k", nodes=3)
    assert line == (
        "parallel.dp: 32 ranks (tp x pp x cp x dp), and 3 x 8 GPUs are 24; use a smaller layout, or at least 4 nodes"
    )
    (line,) = problems("qwen3-8b-16k", gpu="A100")
    assert line.startswith("model.fp8.recipe: blockwise needs Hopper or later, and the GPU here has capability 8.0")
    (line,) = problems("qwen2.5-7b-math", "rollout.kv_cache_gib=26", gpu="A100-40GB")
    assert line.startswith("rollout.kv_cache_gib: 26 beside 15.23 GB of weights does not fit a GPU of 42.95 GB")
    (line,) = problems("r1-distill-qwen-7b-16k", available_bytes=152 * 10**9)  # 91.4 GB + 4 x 15.2
    assert line.startswith("train.offload_while_sampling: true (91.") and "would wait in this machine's memory" in line
    assert problems("r1-distill-qwen-7b-16k", available_bytes=153 * 10**9) == []
    # Of each of 16 nodes: 393 GB of optimizer state over them, and one engine's 65.5 GB.
    assert problems("qwen3-32b-16k", available_bytes=91 * 10**9) == []
    (line,) = problems("qwen3-32b-16k", available_bytes=90 * 10**9)
    assert "true (24.57 GB), rollout.sleep_while_training: true (65.52 GB) would wait" in line


def test_engines_of_their_own_have_the_nodes_that_are_left() -> None:
    dedicated = ["rollout.placement=dedicated", "rollout.driver=node0:29600", *SLEEPLESS]
    assert problems("qwen3-32b-16k", *dedicated, "parallel.dp=8", "rollout.replicas=8") == []
    (line,) = problems("qwen3-32b-16k", *dedicated, "parallel.dp=8", "rollout.replicas=9")
    assert line == (
        "rollout.replicas: 9 dedicated engines of rollout.tp=8, and 8 nodes without ranks have room for 8; use fewer, "
        "or more nodes"
    )
    (line,) = problems("qwen3-32b-16k", *dedicated, "rollout.replicas=1")
    assert "0 nodes without ranks have room for 0" in line
    lines = problems("qwen3-32b-16k", *dedicated, "parallel.dp=8", "rollout.replicas=8", "rollout.kv_cache_gib=80")
    assert [line.split(":")[0] for line in lines] == ["rollout.kv_cache_gib"]


def test_a_stage_is_held_against_what_it_needs_alone() -> None:
    recipe = load("qwen3-8b-16k", "rollout.extra_args=[--x]")
    here = machine(recipe, 1, 8, "H100")

    def keys(stage: Stage | None) -> list[str]:
        return [line.partition(":")[0] for line in shape_problems(recipe, stage, here)]

    assert (keys("train"), keys("estimate-vstar")) == (["parallel.dp"], ["rollout.extra_args"])
    assert keys("evaluate") == ["rollout.extra_args"]  # its workers have as many engines as there are GPUs for
    assert keys(None) == ["parallel.dp", "rollout.extra_args"]
    assert keys("serve") == ["rollout.placement"]  # colocated engines are started with the ranks
    recipe = load("qwen3-8b-16k", "rollout.placement=dedicated", "rollout.driver=node0:29600", *SLEEPLESS)
    assert keys("serve") == []


COMMANDS = [
    ["estimate-vstar"],
    ["estimate-vstar", "--merge"],
    ["train"],
    ["serve"],
    ["evaluate"],
    ["warmup", "warmup.data=pairs.jsonl", "warmup.start=shape:qwen3-8b"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_that_need_weights_refuse_a_shape(in_process, command: list[str], tmp_path: Path) -> None:
    result = in_process(*command, "-r", "qwen3-8b-16k", *DATA, f"run.dir={tmp_path}", f"vstar.dir={tmp_path}/v")
    lines = result.stderr.splitlines()
    says = "has no weights, it is for `megatron-apo doctor` alone; give a Hugging Face folder"
    keys = ["model.path", *(["warmup.start"] if "warmup" in command else [])]
    assert (result.returncode, lines) == (2, [f"error: {key}: shape:qwen3-8b {says}" for key in keys])


def test_another_model_can_be_evaluated_by_a_recipe_with_a_shape(in_process, tmp_path: Path) -> None:
    result = in_process(
        "evaluate", "-r", "quickstart", "model.path=shape:qwen3-8b", *DATA, "vstar.dir=v", "--model", tmp_path
    )
    assert result.returncode and "shape:" not in result.stderr and str(tmp_path) in result.stderr


def test_a_shape_that_there_is_not_names_those_there_are(in_process) -> None:
    result = in_process("train", "-r", "quickstart", "model.path=shape:qwen3-9b", *DATA, "vstar.dir=v")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: model.path: 'shape:qwen3-9b' is not allowed; use a Hugging Face folder, or one of ")
    assert all(f"shape:{name}" in line for name in PARAMETERS)


def test_the_doctor_describes_what_it_did_not_see(in_process) -> None:
    said = in_process("doctor", "-r", "qwen3-8b-16k", *DATA, "--nodes", 4, "--gpu", "H100")
    text = " ".join(said.stdout.split())
    assert said.returncode == 0 and "Installed" not in text
    assert "both stages can start on 4 x 8 GPUs of 85.52 GB. The recipe trains on Transformer Engine's layers." in text
    assert "Not looked at: software and network there; host memory (--host-memory); weights, tokenizer" in text
    refused = in_process("doctor", "-r", "qwen3-8b-16k", *DATA, "--gpus", 4, "--nodes", 4, "--gpu", "H200")
    assert (refused.returncode, refused.stderr.count("error: ")) == (2, 1) and "at least 8 nodes" in refused.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--nodes", "4"], "--gpu too"),
        (["--gpu", "H100"], "--recipe too"),
        (["-r", "qwen3-8b-16k", *DATA, "--gpu", "GTX"], "A100, H100"),
        (["-r", "qwen3-8b-16k", *DATA, "--gpu", "H100", "--host-memory", "much"], "5GB or 500MiB"),
    ],
)
def test_a_machine_that_is_not_described(in_process, options: list[str], says: str) -> None:
    result = in_process("doctor", *options)
    assert result.returncode in (1, 2) and says in " ".join(result.stderr.replace("│", " ").split())
