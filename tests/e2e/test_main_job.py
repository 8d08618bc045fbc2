"""Both stages end to end, as a user runs them, and what a user breaks: real ranks, real vLLM, real graders.

One small quickstart (four ranks, TP 2 x PP 2) makes the model and the V* store that the other tests train on.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_apo.config import load_recipe
from megatron_apo.stages.curriculum import open_curriculum
from megatron_apo.values.fingerprint import StoreError
from megatron_apo.values.store import VStarStore
from tests.e2e.command import ENGINE, Command

SMALL = [
    "data.max_prompts=256",
    "warmup.steps=30",
    "vstar.samples_per_prompt=4",
    "vstar.prompts_per_shard=128",
    "train.steps=3",
    "train.prompts_per_step=32",
    "train.minibatches=2",
    "eval.max_prompts=16",
    "eval.every=2",
    "telemetry.progress=false",
    "reward.name=parity:Parity",
]
# A user's reward, which an untrained model earns about half of the time, so that three steps have something to learn.
PARITY = """
class Parity:
    name, version = "parity", "1"
    def __call__(self, request):
        return float(len(request.response) % 2)
"""


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a finished small quickstart."""
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "parity.py").write_text(PARITY)
    arguments = ["--seed", "3", "--out", str(folder / "run"), *SMALL, "parallel.tp=2"]
    run = Command(folder, "quickstart", *arguments, PYTHONPATH=str(folder))
    try:
        assert run.wait() == 0, run.output
        assert run.processes() == []
    finally:
        run.stop()
    return folder / "run"


def rows(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def steps_done(run: Path) -> int:
    return max((row["step"] for row in rows(run) if "loss" in row), default=0)


@pytest.fixture(autouse=True)
def reward_is_importable(quickstart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(quickstart.parent))
    monkeypatch.syspath_prepend(quickstart.parent)


def train_arguments(quickstart: Path, run: Path, *overrides: str) -> list[str]:
    """Train again on the quickstart's model and store, in a new run folder; two ranks."""
    return [
        "train",
        "-r",
        str(quickstart / "recipe.yaml"),
        f"run.dir={run}",
        "parallel.tp=1",
        "train.steps=6",
        *overrides,
    ]


def test_quickstart(quickstart: Path) -> None:
    summary = json.loads((quickstart / "summary.json").read_text())
    assert set(summary["phases_s"]) == {"warmup", "estimate_vstar", "train", "total"}
    assert set(summary["pass_at_1"]) == {"before", "after"}
    assert (
        summary["pass_at_1"]["after"]["num_prompts"] == 16 and summary["pass_at_1"]["after"]["samples_per_prompt"] == 8
    )
    assert summary["sync"]["count"] == 4  # before the first step, and after each
    assert {"trainer rank 0", "trainer rank 3", "vllm server"} <= set(summary["peak_memory_bytes"])
    assert summary["max_log_prob_difference"] <= 1e-4
    training = [row for row in rows(quickstart) if "loss" in row]
    assert [row["step"] for row in training] == [1, 2, 3]
    assert training[0]["kl/per_token"] == 0.0  # policy and reference are the same numbers, exactly
    assert training[1]["kl/per_token"] != 0.0
    assert [row["step"] for row in rows(quickstart) if "eval/avg_at_k" in row] == [0, 2, 3]
    page = (quickstart / "report.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_trained_model_loads_in_transformers(quickstart: Path) -> None:
    trained, reference = quickstart / "checkpoints" / "hf", quickstart / "models" / "reference"
    model = transformers.AutoModelForCausalLM.from_pretrained(trained)
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained)
    tokens = tokenizer("47+8+5=", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(tokens).logits).all()
    before, after = (load_file(folder / "model.safetensors") for folder in (reference, trained))
    assert before.keys() == after.keys()
    change = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 0 < change < 1e-2  # six Adam steps of at most about 1e-4 each


def test_store_of_another_run_is_refused(quickstart: Path, command, tmp_path: Path) -> None:
    changes = [f"model.reference={quickstart}/models/untrained", "sampling.max_response_tokens=20"]
    run = command(*train_arguments(quickstart, tmp_path / "run", *changes))
    assert run.wait() == 1
    lines = run.output.splitlines()
    assert lines[0].startswith("error: ") and "not the V* store of this run" in lines[0], run.output
    for field in ("model_hash", "max_response_tokens"):
        assert any(line.startswith(f"{field}: store has ") and "this run has" in line for line in lines), run.output
    assert len(lines) == 3, run.output


def refusal(quickstart: Path, run: Path, *overrides: str) -> str:
    """What training says before any work, asked in this process."""
    recipe = load_recipe(str(quickstart / "recipe.yaml"), [f"run.dir={run}", *overrides])
    with pytest.raises(StoreError) as caught:
        open_curriculum(recipe)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "field"), [("reward.name=gsm8k", "reward_name"), ("data.max_prompts=128", "dataset_hash")]
)
def test_store_of_another_task_is_refused(override: str, field: str, quickstart: Path, tmp_path: Path) -> None:
    assert f"\n{field}: store has " in refusal(quickstart, tmp_path / "run", override)


def test_other_template_is_refused(quickstart: Path, tmp_path: Path) -> None:
    """The same weights with a tokenizer that renders prompts differently."""
    other = tmp_path / "other"
    shutil.copytree(quickstart / "models" / "reference", other)
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    said = refusal(quickstart, tmp_path / "run", f"model.path={other}", "data.template=chat")
    assert "template: store has 'raw', this run has 'chat'" in said
    assert "template_hash: store has" in said


def test_missing_model_is_one_line(quickstart: Path, command, tmp_path: Path) -> None:
    run = command(*train_arguments(quickstart, tmp_path / "run", "model.path=/nowhere/model"))
    assert run.wait() == 2
    assert run.output.count("\n") == 1 and "/nowhere/model" in run.output


def test_port_in_use_is_one_line(quickstart: Path, command, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = command(*train_arguments(quickstart, tmp_path / "run", f"rollout.port={port}"))
        assert run.wait() == 1
    assert f"{port}" in run.output and "in use" in run.output and "Traceback" not in run.output
    assert run.processes() == []


def test_a_dead_server_is_restarted_once(quickstart: Path, command, tmp_path: Path) -> None:
    run = command(*train_arguments(quickstart, tmp_path / "run"))
    run.wait_for(lambda: steps_done(tmp_path / "run") >= 2)
    assert run.kill(ENGINE)
    assert run.wait() == 0, run.output
    assert run.output.count("restarting it once") == 1
    training = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in training] == [1, 2, 3, 4, 5, 6]
    assert max(row["mismatch/max"] for row in training) <= 1e-4  # the new server holds the trained weights
    assert run.processes() == []


def test_a_second_death_in_a_step_stops_the_run(quickstart: Path, command, tmp_path: Path) -> None:
    run = command(*train_arguments(quickstart, tmp_path / "run"))
    run.wait_for(lambda: steps_done(tmp_path / "run") >= 1)
    while run.process.poll() is None:
        run.kill(ENGINE)
        time.sleep(0.2)
    assert run.process.returncode == 1
    assert "restarting it once" in run.output
    assert "died twice" in run.output or "at its start" in run.output, run.output
    assert "EngineCore" in run.output  # the end of the server's log
    assert run.processes() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_leaves_nothing(number: signal.Signals, quickstart: Path, command, tmp_path: Path) -> None:
    shared = {path.name for path in Path("/dev/shm").iterdir()}
    run = command(*train_arguments(quickstart, tmp_path / "run", "train.steps=1000"))
    run.wait_for(lambda: steps_done(tmp_path / "run") >= 1)
    run.process.send_signal(number)
    assert run.wait() == 128 + number
    assert run.processes() == []
    assert {path.name for path in Path("/dev/shm").iterdir()} <= shared


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ended_quickstart_leaves_nothing(number: signal.Signals, command, tmp_path: Path) -> None:
    """In its second stage, whose two vLLM workers are far below it."""
    shared = {path.name for path in Path("/dev/shm").iterdir()}
    small = [*SMALL, "warmup.steps=1", "vstar.samples_per_prompt=64", "rollout.tp=2"]
    run = command("quickstart", "--out", str(tmp_path / "run"), *small)
    run.wait_for(lambda: run.processes("Worker_TP"))
    time.sleep(3)  # until their shared memory is there
    run.process.send_signal(number)
    assert run.wait() == {signal.SIGINT: 130, signal.SIGKILL: -9}[number], run.output
    end = time.monotonic() + 10
    while run.processes() or not {path.name for path in Path("/dev/shm").iterdir()} <= shared:
        assert number == signal.SIGKILL and time.monotonic() < end, run.processes()
        time.sleep(0.1)


def untied_model(quickstart: Path, out: Path) -> Path:
    """A random Qwen2 with an output head of its own and QKV biases, over the quickstart's tokenizer."""
    shutil.copytree(quickstart / "models" / "reference", out)
    (out / "model.safetensors").unlink()
    reference = json.loads((out / "config.json").read_text())
    config = transformers.Qwen2Config(
        vocab_size=reference["vocab_size"],
        eos_token_id=reference["eos_token_id"],
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=192,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(out)
    return out


def test_untied_model_with_two_vllm_workers(quickstart: Path, command, tmp_path: Path) -> None:
    """Both stages; after every step vLLM's log-probs are Megatron's."""
    shared = [f"model.path={untied_model(quickstart, tmp_path / 'untied')}", f"vstar.dir={tmp_path / 'vstar'}"]
    shared += [f"run.dir={tmp_path / 'run'}", "rollout.tp=2", "data.max_prompts=32"]
    stage_1 = command("estimate-vstar", "-r", str(quickstart / "recipe.yaml"), *shared)
    assert stage_1.wait() == 0, stage_1.output
    assert stage_1.processes() == []
    learning = ["train.steps=2", "sync.probe_every=1", "optimizer.lr=1e-3", "optimizer.warmup_steps=0", "eval.every=0"]
    run = command(*train_arguments(quickstart, tmp_path / "run", *shared, *learning))
    assert run.wait() == 0, run.output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["max_log_prob_difference"] <= 1e-4
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "untied", tmp_path / "run" / "checkpoints" / "hf")
    )
    assert all((before[name] != after[name]).any() for name in before)
    assert run.processes() == []


@pytest.mark.parametrize(
    "layout",
    [("parallel.pp=2", "parallel.vpp=2"), pytest.param(("parallel.pp=1", "parallel.cp=2"), marks=pytest.mark.full)],
    ids=["vpp", "cp"],
)
def test_other_layouts_and_placements_train_alike(
    layout: tuple[str, ...], quickstart: Path, command, tmp_path: Path
) -> None:
    """Against the quickstart's TP 2 x PP 2: moments and master weights survive their way to host memory and back."""
    placement = ["model.reference_mode=swap", "train.offload_while_sampling=true", "train.entropy=true"]
    arguments = train_arguments(quickstart, tmp_path / "run", *layout, *placement, "train.steps=3")
    run = command(*arguments)
    assert run.wait() == 0, run.output
    assert run.processes() == []
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["max_log_prob_difference"] <= 1e-4
    expected, found = ([row for row in rows(folder) if "loss" in row] for folder in (quickstart, tmp_path / "run"))
    assert len(found) == 3
    for name in ("reward/mean", "loss", "kl/per_token", "grad_norm", "grad_norm_reinforce"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], rel=1e-3, abs=1e-6), name
    assert found[0]["kl/per_token"] == 0.0
    assert all(0 < row["entropy/per_token"] < math.log(18) for row in found)  # 18 tokens in the vocabulary


STALE = "model.layers.1.mlp.down_proj.weight"
TRAIN_WITH_A_STALE_TENSOR = f"""
import sys
from megatron_apo.config import load_recipe
from megatron_apo.parallel.topology import alone
from megatron_apo.stages.train import train
from megatron_apo.weights.stream import WeightStream

stream, first = WeightStream.__iter__, {{}}

def stale(self):
    for name, tensor in stream(self):
        yield name, first.setdefault(name, tensor.clone()) if name == {STALE!r} else tensor

WeightStream.__iter__ = stale
with alone() as topology:
    train(load_recipe(sys.argv[1], sys.argv[2:]), topology)
"""


def test_a_stale_tensor_stops_the_run_with_its_name(quickstart: Path, command, tmp_path: Path) -> None:
    arguments = train_arguments(quickstart, tmp_path / "run", "parallel.pp=1", "sync.probe_every=1")[2:]
    learning = ["optimizer.lr=1e-2", "optimizer.warmup_steps=0"]
    run = command(*arguments, *learning, program=("-c", TRAIN_WITH_A_STALE_TENSOR))
    assert run.wait() == 1
    assert "SyncError: vLLM's log-probs differ" in run.output, run.output
    assert f"; stale: {STALE}\n" in run.output, run.output
    assert steps_done(tmp_path / "run") == 0
    assert run.processes() == []


def test_faulty_grader_fails_its_samples_only(quickstart: Path, command, tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(
        "import time\n"
        "class Faulty:\n"
        "    name, version = 'faulty', '1'\n"
        "    def __call__(self, request):\n"
        "        if request.prompt.endswith('7='): raise KeyError('seven')\n"
        "        if request.prompt == HANG: time.sleep(1000)\n"
        "        return 1.0\n"
        f"HANG = {json.loads((quickstart / 'data' / 'train.jsonl').read_text().splitlines()[0])['prompt']!r}\n"
    )
    run = command(
        "estimate-vstar",
        "-r",
        str(quickstart / "recipe.yaml"),
        f"run.dir={tmp_path / 'run'}",
        f"vstar.dir={tmp_path / 'vstar'}",
        "reward.name=faulty:Faulty",
        "reward.time_limit_s=1",
        "reward.failure_reward=-1",
        "data.max_prompts=32",
        PYTHONPATH=str(tmp_path),
    )
    assert run.wait() == 0, run.output
    prompts = [
        json.loads(line)["prompt"] for line in (quickstart / "data" / "train.jsonl").read_text().splitlines()[:32]
    ]
    failing = [prompt.endswith("7=") or prompt == prompts[0] for prompt in prompts]
    store = VStarStore.open(tmp_path / "vstar")
    failed, unfinished = (store.column(name).to_pylist() for name in ("num_failures", "num_unfinished"))
    assert any(failed) and not any(number and not fails for number, fails in zip(failed, failing, strict=True))
    means = store.values(1, "mean").values_P
    for fails, by_grader, by_model, mean in zip(failing, failed, unfinished, means, strict=True):
        assert by_grader == (4 - by_model if fails else 0)
        assert mean == pytest.approx((4 - 2 * (by_grader + by_model)) / 4)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())["vstar"]
    assert summary["grader_failures"] == sum(failed) and summary["unfinished_thinking"] == sum(unfinished)
    assert summary["mean_reward"] == pytest.approx(means.mean())
    assert run.processes() == []
