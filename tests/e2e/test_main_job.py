"""Both stages end to end, as a user runs them, and what a user breaks: real ranks, real vLLM, real graders.

One small quickstart (two ranks, TP 2) makes the model and the V* store that the other tests train on. Every
run costs a minute of CPU, so each has several uses: it is looked at, disturbed, and ended in a way of its own, and
`Command` sees that nothing is left of it.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_apo.config import load_recipe
from megatron_apo.data.rollouts import FINISH_REASONS, RolloutFolder
from megatron_apo.preflight import open_training
from megatron_apo.rollout.inputs import load_inputs
from megatron_apo.runtime import guard
from megatron_apo.runtime.ports import free_port
from megatron_apo.stages.convert import megatron_to_hf
from megatron_apo.values.fingerprint import StoreError
from megatron_apo.values.store import VStarStore
from megatron_apo.weights.gather import Gather
from megatron_apo.weights.plan import Bucket
from tests.e2e.command import ENGINE, Command
from tests.e2e.conftest import assert_all_gone, traces
from tests.e2e.torchrun import start_agents

FILE = "model.safetensors"

SMALL = [
    "data.max_prompts=256",
    "warmup.steps=10",
    "vstar.samples_per_prompt=4",
    "vstar.prompts_per_shard=128",
    "train.steps=3",
    "train.prompts_per_step=32",
    "train.minibatches=2",
    "train.save_every=2",
    "eval.max_prompts=16",
    "eval.every=2",
    "train.record=true",
    "telemetry.progress=false",
    "reward.name=parity:Parity",
]
# A user's reward, which an untrained model earns about half of the time, so that three steps have something to learn.
PARITY = """
import os, time
class Parity:
    name, version = "parity", "1"
    def __call__(self, request):
        time.sleep(float(os.environ.get("SECONDS_EACH", 0)))
        if "GRADED" in os.environ:
            with open(os.environ["GRADED"], "a") as file:
                file.write(request.prompt + request.response + "\\n")
        return float(len(request.response) % 2)
"""


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a finished small quickstart."""
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "parity.py").write_text(PARITY)
    arguments = ["--seed", "3", "--out", str(folder / "run"), *SMALL, "parallel.tp=2", "parallel.pp=1"]
    run = Command(folder, "quickstart", *arguments, PYTHONPATH=str(folder))
    try:
        assert run.wait() == 0, run.output
    finally:
        run.stop()
    return folder / "run"


def rows(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def training_rows(run: Path) -> list[dict]:
    return [row for row in rows(run) if "loss" in row]


def steps_done(run: Path) -> int:
    return max((row["step"] for row in training_rows(run)), default=0)


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
        "parallel.pp=2",
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
    assert {"trainer rank 0", "trainer rank 1", "vllm server"} <= set(summary["peak_memory_bytes"])
    assert (quickstart / "logs" / "vllm.log").read_text().count("Starting vLLM server on") == 1  # the one begun early
    assert summary["max_log_prob_difference"] <= 1e-4
    training = training_rows(quickstart)
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
    before, after = (load_file(folder / FILE) for folder in (reference, trained))
    assert before.keys() == after.keys()
    change = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 0 < change < 1e-2  # six Adam steps of at most about 1e-4 each


def test_training_begins_with_stage_1_on_its_engine(quickstart: Path, command, tmp_path: Path) -> None:
    """Killed there, and then asked to end, it goes on with the shards that are written. The store is as estimate-vstar
    has made it."""
    run, folder = tmp_path / "run", tmp_path / "vstar"
    own = [f"vstar.dir={folder}", "vstar.at_start=true", "vstar.prompts_per_shard=16", "train.steps=1"]
    arguments = train_arguments(quickstart, run, *own)
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGUSR1, 75)):
        before = len(list(folder.glob("shard-*")))
        broken_off = command(*arguments, SECONDS_EACH="0.05")
        broken_off.wait_for(lambda before=before: len(list(folder.glob("shard-*"))) > before)
        assert broken_off.send(number) == code, broken_off.output
        assert not (folder / "manifest.json").exists() and not training_rows(run)
    assert "ended early in stage 1, whose written shards are kept (SIGUSR1)" in broken_off.output
    last = command(*arguments)
    assert last.wait() == 0, last.output
    assert (run / "logs" / "vllm.log").read_text().count("Starting vLLM server on") == 3  # once each time
    found, expected = (VStarStore.open(path) for path in (folder, quickstart / "vstar"))
    assert found.prompt_ids == expected.prompt_ids and (found.rewards.flat == expected.rewards.flat).all()
    (row,) = training_rows(run)
    assert row["kl/per_token"] == 0.0 and row["mismatch/max"] <= 1e-4
    assert {"estimate_vstar", "train"} <= json.loads((run / "summary.json").read_text())["phases_s"].keys()


def test_store_of_another_run_is_refused(quickstart: Path, in_process, tmp_path: Path) -> None:
    changes = [f"model.reference={quickstart}/models/untrained", "sampling.max_response_tokens=20"]
    run = in_process(*train_arguments(quickstart, tmp_path / "run", *changes))
    assert (run.returncode, run.stdout) == (1, "")
    lines = run.stderr.splitlines()
    assert "not the V* store of this run" in lines[0] and all(line.startswith("error: ") for line in lines), run.stderr
    for field in ("model_hash", "max_response_tokens"):
        told = f"error: {field}: store has "
        assert any(line.startswith(told) and "this run has" in line for line in lines), run.stderr
    assert len(lines) == 3, run.stderr


def refusal(quickstart: Path, run: Path, *overrides: str) -> str:
    """What training says before any work, asked in this process."""
    recipe = load_recipe(str(quickstart / "recipe.yaml"), [f"run.dir={run}", *overrides])
    with pytest.raises(StoreError) as caught:
        open_training(recipe)
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


def test_missing_model_is_one_line(quickstart: Path, in_process, tmp_path: Path) -> None:
    run = in_process(*train_arguments(quickstart, tmp_path / "run", "model.path=/nowhere/model"))
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.count("\n") == 1 and "/nowhere/model" in run.stderr


def as_only_rank() -> dict[str, str]:
    """The environment in which `train` is a job's only rank, as torchrun would start it."""
    return {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port("127.0.0.1"))}


@pytest.fixture
def no_process_left() -> Iterator[None]:
    """A command in this process ends those that it starts."""
    before = set(guard.descendants(os.getpid()))
    yield
    assert set(guard.descendants(os.getpid())) <= before


def test_port_in_use_is_one_line(quickstart: Path, in_process, no_process_left, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = train_arguments(quickstart, tmp_path / "run", "parallel.pp=1", f"rollout.port={port}")
        run = in_process(*arguments, **as_only_rank())
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1 and f"{port}" in run.stderr and "in use" in run.stderr, run.stderr


STALE = "model.layers.1.mlp.down_proj.weight"


def test_a_stale_tensor_stops_the_run_with_its_name(
    quickstart: Path, in_process, no_process_left, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gather, first = Gather.buckets, {}

    def stale(self: Gather, *arguments: Any, **options: Any) -> Iterator[tuple[Bucket, torch.Tensor]]:
        for bucket, buffer in gather(self, *arguments, **options):
            names = [meta.name for meta in bucket.tensors]
            if STALE in names and options.get("shared"):
                view = bucket.views(buffer)[names.index(STALE)]
                view.copy_(first.setdefault(STALE, view.clone()))
            yield bucket, buffer

    monkeypatch.setattr(Gather, "buckets", stale)
    learning = ["sync.probe_every=1", "optimizer.lr=1e-2", "optimizer.warmup_steps=0"]
    arguments = train_arguments(quickstart, tmp_path / "run", "parallel.pp=1", *learning)
    run = in_process(*arguments, **as_only_rank())
    assert run.returncode == 1
    assert "error: vLLM's log-probs differ" in run.stderr, run.stderr
    assert run.stderr.endswith(f"; stale: {STALE}\n"), run.stderr
    assert steps_done(tmp_path / "run") == 0


@pytest.mark.parametrize(
    "layout",
    [("parallel.vpp=2",), pytest.param(("parallel.pp=1", "parallel.cp=2"), marks=pytest.mark.full)],
    ids=["vpp", "cp"],
)
def test_another_layout_trains_alike_over_the_death_of_its_server(
    layout: tuple[str, ...], quickstart: Path, command, tmp_path: Path
) -> None:
    """Against the quickstart's TP 2: moments and master weights survive their way to host memory and back, and the
    server that is started in place of a dead one holds the trained weights. Under torchrun, which leaves as much of a
    run as our launcher does."""
    placement = ["model.reference_mode=swap", "train.offload_while_sampling=true", "train.entropy=true"]
    arguments = train_arguments(quickstart, tmp_path / "run", *layout, *placement)
    run, second = start_agents(command, tmp_path / "agents", *arguments)
    run.wait_for(lambda: steps_done(tmp_path / "run") >= 1)
    assert run.kill(ENGINE)
    assert run.wait() == 0, run.output
    assert second.wait() == 0, second.output
    assert run.output.count("restarting it once") == 1
    expected, found = training_rows(quickstart), training_rows(tmp_path / "run")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    for name in ("reward/mean", "loss", "kl/per_token", "grad_norm", "grad_norm_reinforce"):
        assert [row[name] for row in found[:3]] == pytest.approx([row[name] for row in expected], rel=1e-3, abs=1e-6), (
            name
        )
    assert found[0]["kl/per_token"] == 0.0
    assert all(0 < row["entropy/per_token"] < math.log(18) for row in found)  # 18 tokens in the vocabulary
    assert max(row["mismatch/max"] for row in found) <= 1e-4
    whole, summary = (json.loads((folder / "summary.json").read_text()) for folder in (quickstart, tmp_path / "run"))
    assert summary["max_log_prob_difference"] <= 1e-4
    assert summary.keys() == whole.keys() - {"vstar"} and summary["versions"] == whole["versions"]
    assert summary["phases_s"].keys() == {"train"} and summary["phases_s"]["train"] > sum(
        row["time/step_s"] for row in found
    )
    assert load_recipe(str(tmp_path / "run" / "train.yaml"), []) == load_recipe(arguments[2], arguments[3:])
    assert (tmp_path / "run" / "logs" / "rank1.log").is_file()


@pytest.mark.full  # tests/unit/test_rollouts.py has it with servers of its own
def test_a_second_death_in_a_step_stops_the_run(quickstart: Path, command, tmp_path: Path) -> None:
    run = command(*train_arguments(quickstart, tmp_path / "run"))
    run.wait_for(lambda: steps_done(tmp_path / "run") >= 1)
    (server,) = run.processes("guard.py")
    everything = traces([server.pid, *guard.descendants(server.pid)])
    assert run.kill("api_server")  # the engine is below it
    assert_all_gone(everything)
    assert run.process.poll() is None
    while run.process.poll() is None:
        run.look()
        run.kill(ENGINE)
        time.sleep(0.2)
    assert run.wait() == 1
    assert "restarting it once" in run.output and "Traceback" not in run.output
    assert "died twice" in run.output or "at its start" in run.output, run.output
    assert "EngineCore" in run.output  # the end of the server's log


# A user's code in rank 0, which asks the reward for its version: it puts two faults into the weights' way to an engine.
# In the sync of version 3 engine 0 is not told all that it needs; in that of version 4, engine 1 is killed.
FAULTY_TRANSFER = """
import os, signal
from collections import Counter
from pathlib import Path

if os.environ.get("RANK") == "0":
    from megatron_apo.rollout.transport.shm import ShmSender

    update_info, syncs = ShmSender.update_info, Counter()

    def faulty(self, engine):
        info = update_info(self, engine)
        syncs[engine.number] += 1
        if (engine.number, syncs[engine.number]) == (0, 4):
            del info["slot_bytes"]
        if (engine.number, syncs[engine.number]) == (1, 5):
            for pid in engine.server.pids():
                if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(pid, signal.SIGKILL)
        return info

    ShmSender.update_info = faulty
"""


@dataclass(frozen=True)
class TwoEngines:
    """A finished run of two engines. killed: the engine that was killed in the second step."""

    run: Path
    output: str
    graded: list[str]
    killed: int


@pytest.fixture(scope="module")
def two_engines(quickstart: Path, tmp_path_factory: pytest.TempPathFactory) -> TwoEngines:
    """Four steps of two ranks over two engines. In the second, an engine is killed while it has requests to answer."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "parity.py").write_text(PARITY + FAULTY_TRANSFER)
    graded = folder / "graded"
    slow = ["rollout.max_num_seqs=2", "eval.samples=1", "eval.max_prompts=4", "eval.every=0"]
    arguments = train_arguments(quickstart, folder / "run", "rollout.replicas=2", *slow)
    environment = {"GRADED": str(graded), "PYTHONPATH": str(folder)}
    command = Command(folder / "command", *arguments, "train.steps=4", **environment)
    try:
        command.wait_for(lambda: steps_done(folder / "run") >= 1)
        before = num_lines(graded)
        command.wait_for(lambda: num_lines(graded) >= before + 4)
        command.processes(ENGINE)[-1].kill()
        assert command.wait() == 0, command.output
    finally:
        command.stop()
    killed = re.search(r"rollout engine (\d) died in step 1 ", command.output)
    assert killed, command.output
    return TwoEngines(folder / "run", command.output, graded.read_text().splitlines(), int(killed[1]))


def num_lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def test_an_engine_killed_in_a_step_serves_again_with_proven_weights(two_engines: TwoEngines) -> None:
    killed, output = two_engines.killed, two_engines.output
    asked_again = re.search(rf"rollout engine {killed} died in step 1 .*unfinished requests, (\d+)\n", output)
    assert asked_again and 1 <= int(asked_again[1]) <= 3, output  # two that it decodes, and one that waits in it
    proven = re.search(rf"engine {killed} serves again, with the weights of version 2; .* by at most (\S+)\n", output)
    assert proven and float(proven[1]) <= 1e-4, output
    training = training_rows(two_engines.run)
    by_engine = [[row[f"rollout/engine{number}/responses"] for number in range(2)] for row in training]
    assert [sum(counts) for counts in by_engine] == [32] * 4
    assert by_engine[1][1 - killed] > by_engine[1][killed]
    assert min(by_engine[2]) > 0, by_engine  # the step after: both of them
    log = (two_engines.run / "logs" / f"vllm-{killed}.log").read_text()
    assert log.count("Starting vLLM server on") >= 2
    assert max(row["mismatch/max"] for row in training) <= 1e-4
    summary = json.loads((two_engines.run / "summary.json").read_text())
    assert {"vllm server 0", "vllm server 1"} <= set(summary["peak_memory_bytes"])
    assert summary["max_log_prob_difference"] <= 1e-4 and summary["sync"]["count"] == 5


def test_nothing_is_sampled_or_graded_twice_over_a_death(two_engines: TwoEngines) -> None:
    inputs = load_inputs(load_recipe(str(two_engines.run / "recipe.yaml"), []))
    prompts = {prompt.prompt_id: prompt for prompt in inputs.training.prompts}
    sampled: Counter[str] = Counter()
    for step in range(4):
        batch = RolloutFolder(two_engines.run / "rollouts").read(step)
        assert len(set(batch.prompt_ids)) == 32 and set(batch.weight_version_B.tolist()) == {step}
        for row, prompt_id in enumerate(batch.prompt_ids):
            ids, reason = batch.sequences.response(row).tolist(), FINISH_REASONS[batch.finish_reason_B[row]]
            request = inputs.grade_request(prompts[prompt_id], ids, reason)
            sampled[request.prompt + request.response] += 1
    graded = Counter(line for line in two_engines.graded if line in sampled)
    assert graded.total() > 32  # no grader sees a response that never closed its thinking
    assert all(sampled[line] == times for line, times in graded.items())
    assert len(two_engines.graded) - graded.total() <= 2 * (
        4 + 4
    )  # two evaluations of four prompts, sampled and greedy


def test_two_engines_sample_what_one_samples(quickstart: Path, two_engines: TwoEngines) -> None:
    one, two = (RolloutFolder(run / "rollouts").read(0) for run in (quickstart, two_engines.run))
    assert two.prompt_ids == one.prompt_ids
    rows = range(len(one))
    same = [np.array_equal(two.sequences.row(row), one.sequences.row(row)) for row in rows]
    print(f"{same.count(False)} of {len(one)} responses differ between one engine and two")
    assert [two.sequences.prompt(row).tolist() for row in rows] == [one.sequences.prompt(row).tolist() for row in rows]
    assert all(two.reward_B[row] == one.reward_B[row] for row in rows if same[row])
    assert sum(same) >= len(one) // 2  # seeds and weights are the same; rounding may change the course of a few


def test_an_engine_whose_update_raised_is_restarted(two_engines: TwoEngines) -> None:
    output = two_engines.output
    failed = re.search(r"a weight update failed in step 2 \((.*)\); restarting its engine\n", output)
    assert failed and "/update_weights" in failed[1], output
    assert "rollout engine 0 serves again, with the weights of version 3;" in output
    row = training_rows(two_engines.run)[3]
    assert min(row["rollout/engine0/responses"], row["rollout/engine1/responses"]) > 0


def test_an_engine_killed_in_a_sync_does_not_keep_the_other_from_its_weights(two_engines: TwoEngines) -> None:
    """In the run's last, so that what is started in its place is stopped while it starts."""
    assert "rollout engine 1 died in step 3 (" in two_engines.output
    assert "engine 1 serves again, with the weights of version 4" not in two_engines.output
    assert [row["step"] for row in rows(two_engines.run) if "eval/avg_at_k" in row] == [0, 4]


@pytest.mark.full  # `test_untied_model_trains_until_sigterm` has the other signal
def test_interruption_leaves_nothing(quickstart: Path, command, tmp_path: Path) -> None:
    run = command(*train_arguments(quickstart, tmp_path / "run", "train.steps=1000"))
    run.wait_for(lambda: steps_done(tmp_path / "run") >= 1)
    assert run.send(signal.SIGINT) == 130


def untied_model(quickstart: Path, out: Path) -> Path:
    """A random Qwen2 with an output head of its own and QKV biases, over the quickstart's tokenizer."""
    shutil.copytree(quickstart / "models" / "reference", out)
    (out / FILE).unlink()
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


# A quickstart whose other stages are done.
QUICKSTART_STAGE_1 = "from megatron_apo import cli, quickstart; quickstart.STAGES = ('estimate-vstar',); cli.main()"
FAULTY = """
import time
class Faulty:
    name, version = "faulty", "1"
    def __call__(self, request):
        if request.prompt.endswith("7="): raise KeyError("seven")
        if request.prompt == {hang!r}: time.sleep(1000)
        return float(len(request.response) % 2)
"""


def prompts_of(quickstart: Path, number: int) -> list[str]:
    lines = (quickstart / "data" / "train.jsonl").read_text().splitlines()[:number]
    return [json.loads(line)["prompt"] for line in lines]


def two_workers_share_memory(run: Command) -> bool:
    return len(run.processes("Worker_TP")) == 2 and sum("cpushm" in path.name for path in run.look()) == 2


@pytest.fixture(scope="module")
def untied(quickstart: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a quickstart with an untied model, two vLLM workers and a faulty grader, whose stage 1 was
    killed and begun again."""
    folder = tmp_path_factory.mktemp("untied")
    run, model = folder / "run", untied_model(quickstart, folder / "model")
    (folder / "faulty.py").write_text(FAULTY.format(hang=prompts_of(quickstart, 1)[0]))
    changes = [*SMALL, f"model.path={model}", "rollout.tp=2", "data.max_prompts=32"]
    changes += ["reward.name=faulty:Faulty", "reward.time_limit_s=1", "reward.failure_reward=-1"]
    arguments = ["quickstart", "--seed", "3", "--out", str(run), *changes]
    killed = Command(folder / "killed", *arguments, program=("-c", QUICKSTART_STAGE_1), PYTHONPATH=str(folder))
    again = None
    try:
        killed.wait_for(lambda: two_workers_share_memory(killed))
        assert killed.send(signal.SIGKILL) == -signal.SIGKILL
        assert not (run / "vstar" / "manifest.json").exists()
        arguments = ["estimate-vstar", "-r", str(run / "recipe.yaml")]
        again = Command(folder / "again", *arguments, PYTHONPATH=str(folder))
        assert again.wait() == 0, again.output
    finally:
        for command in filter(None, (killed, again)):
            command.stop()
    return run


@pytest.mark.full  # the others: SIGKILL in `untied`, SIGINT of stage 1 by itself in test_stage1.py
def test_interrupted_quickstart_leaves_nothing(command, tmp_path: Path) -> None:
    """In its second stage, whose two vLLM workers are far below it."""
    small = [*SMALL, "warmup.steps=1", "vstar.samples_per_prompt=64", "rollout.tp=2"]
    run = command("quickstart", "--out", str(tmp_path / "run"), *small)
    run.wait_for(lambda: two_workers_share_memory(run))
    assert run.send(signal.SIGINT) == 130, run.output


def test_faulty_grader_fails_its_samples_only(quickstart: Path, untied: Path) -> None:
    prompts = prompts_of(quickstart, 32)
    failing = [prompt.endswith("7=") or prompt == prompts[0] for prompt in prompts]
    store = VStarStore.open(untied / "vstar")
    columns = ("rewards", "num_failures", "num_unfinished")
    rewards, failed, unfinished = (store.column(name).to_pylist() for name in columns)
    assert any(failed) and not any(number and not fails for number, fails in zip(failed, failing, strict=True))
    for fails, found, by_grader, by_model in zip(failing, rewards, failed, unfinished, strict=True):
        assert by_grader == (4 - by_model if fails else 0)
        assert len(found) == 4 and found.count(-1.0) == by_grader + by_model
        assert set(found) <= {-1.0, 0.0, 1.0}
    summary = json.loads((untied / "summary.json").read_text())["vstar"]
    assert summary["grader_failures"] == sum(failed) and summary["unfinished_thinking"] == sum(unfinished)
    assert summary["mean_reward"] == pytest.approx(sum(map(sum, rewards)) / (4 * 32))


def test_untied_model_trains_until_sigterm(untied: Path, command, tmp_path: Path) -> None:
    """After every step the log-probs of two vLLM workers are Megatron's, whose every tensor has changed."""
    learning = ["sync.probe_every=1", "optimizer.lr=1e-3", "optimizer.warmup_steps=0", "eval.every=0"]
    arguments = train_arguments(untied, tmp_path / "run", *learning, "train.steps=1000")
    run = command(*arguments, PYTHONPATH=str(untied.parent))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
    run.wait_for(checkpoint.exists)
    assert run.send(signal.SIGTERM) == 143
    assert max(row["mismatch/max"] for row in training_rows(tmp_path / "run")) <= 1e-4
    megatron_to_hf(checkpoint, tmp_path / "hf", ranks=1)
    before, after = (load_file(folder / FILE) for folder in (untied.parent / "model", tmp_path / "hf"))
    assert before.keys() == after.keys() and all((before[name] != after[name]).any() for name in before)
