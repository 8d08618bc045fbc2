"""One real vLLM server, shared by every case that leaves it usable, and what is left of one that is gone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen3Config

from megatron_apo.config import RolloutConfig
from megatron_apo.rollout.client import RolloutClient
from megatron_apo.rollout.engine import Address, Engine
from megatron_apo.rollout.server import VLLMServer
from megatron_apo.rollout.transport.base import Source
from megatron_apo.rollout.weight_sync import WeightSync
from megatron_apo.runtime import guard
from tests.e2e.command import Command
from tests.weights import TensorSource

torch.set_num_threads(1)  # the tiny reference models share the cores with the servers under test

EOS = 1
VOCABULARY = 40  # not a multiple of vLLM's padding, 64
MAX_MODEL_LEN = 96


def tiny_model(family: str, tied: bool, seed: int) -> PreTrainedModel:
    """A random fp32 model whose distributions are far from uniform."""
    kind = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}[family]
    config = kind(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=192,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        eos_token_id=EOS,
        bos_token_id=None,
        pad_token_id=0,
    )
    if family == "qwen3":
        config.head_dim = 32  # vLLM's CPU attention wants a multiple of 32
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    return model


def log_probs(model: PreTrainedModel, tokens: list[int], temperature: float = 1.0) -> list[float]:
    """transformers' fp32 log-probs of every token but the first."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1].float() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


def traces(pids: list[int]) -> list[Path]:
    """What a server has in the file system while it runs: its processes (`pids`, the guard first), their shared memory,
    and the folders that its guard made, for payloads and for sockets."""
    shared = guard.mapped_shared_memory(pids)
    words = Path(f"/proc/{pids[0]}/cmdline").read_text().split("\0")
    folders = [Path(word.removeprefix("--folder=")) for word in words if word.startswith("--folder=")]
    assert len(folders) == 2 and all(folder.is_dir() for folder in folders)
    return [*(Path(f"/proc/{pid}") for pid in pids), *shared, *folders]


def assert_all_gone(paths: list[Path]) -> None:
    """None of a server's processes runs any more, and nothing of theirs is left in the file system (`traces`)."""
    end = time.monotonic() + 15
    while left := [path for path in paths if path.exists() and not (path.parts[1] == "proc" and is_zombie(path))]:
        assert time.monotonic() < end, f"still there: {left}"
        time.sleep(0.05)


def is_zombie(process: Path) -> bool:
    return guard.is_zombie(int(process.name))


class ModelSource(TensorSource):
    """That of a plain model: every parameter under its HF name, a tied head left out."""

    def __init__(self, model: PreTrainedModel):
        super().__init__({name: value.detach() for name, value in model.named_parameters()})


@dataclass
class Rollouts:
    """A running engine, and the model that it was started with."""

    engine: Engine
    family: str
    tied: bool

    @property
    def server(self) -> VLLMServer | Address:
        return self.engine.server

    @property
    def client(self) -> RolloutClient:
        return self.engine.client

    def model(self, seed: int) -> PreTrainedModel:
        return tiny_model(self.family, self.tied, seed)

    def sync(self, model: PreTrainedModel, transport: str = "shm") -> WeightSync:
        """A WeightSync over `model`, introduced to the server."""
        return self.sync_of(ModelSource(model), transport)

    def sync_of(self, source: Source, transport: str = "shm") -> WeightSync:
        sync = WeightSync(source, [self.engine], transport=transport)
        self.engine.connect(sync.init_info)
        return sync


StartServer = Callable[..., Rollouts]


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """start_server(family, tied, tp, **rollout options) -> a new Rollouts; stopped at the end of the session."""
    started: list[Rollouts] = []

    def start(family: str = "qwen3", tied: bool = True, tp: int = 1, **options: object) -> Rollouts:
        folder = tmp_path_factory.mktemp("server")
        tiny_model(family, tied, seed=0).save_pretrained(folder / "model")
        config = RolloutConfig(tp=tp, kv_cache_gib=0.1, **options)
        server = VLLMServer(config, folder / "model", log_path=folder / "vllm.log", seed=0, max_model_len=MAX_MODEL_LEN)
        rollouts = Rollouts(Engine(server, timeout_s=120), family, tied)
        rollouts.engine.start()
        started.append(rollouts)
        return rollouts

    yield start
    for rollouts in started:
        rollouts.engine.stop()


@pytest.fixture(scope="session")
def shared_server(start_server: StartServer) -> Callable[[], Rollouts]:
    """The present server that cases share: a new one where a case has ended the last."""
    started: list[Rollouts] = []

    def current() -> Rollouts:
        if not started or not started[-1].server.alive():
            started.append(start_server())
        return started[-1]

    return current


@pytest.fixture
def rollouts(shared_server: Callable[[], Rollouts]) -> Rollouts:
    """The server that the cases share: tied Qwen3, TP 1. A case that leaves it unusable ends it."""
    return shared_server()


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def start(*arguments: str, **options) -> Command:
        started.append(Command(tmp_path / f"command{len(started)}", *arguments, **options))
        return started[-1]

    yield start
    with ExitStack() as stack:
        for each in started:
            stack.callback(each.stop)
