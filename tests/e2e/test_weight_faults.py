"""Faults put into vLLM's workers (`faults.py`), each caught, and named, by the very sync in which it happens; and many
honest syncs in a row that all pass. Updates are as small as a trainer's."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_apo.config import RolloutConfig
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.parallel.groups import alone
from megatron_apo.rollout.engine import Engine, State
from megatron_apo.rollout.server import ServerDied, VLLMServer
from megatron_apo.rollout.weight_sync import SyncError, WeightSync
from megatron_apo.weights.plan import Bucket
from megatron_apo.weights.stream import WeightStream
from tests.batches import no_values
from tests.e2e.conftest import VOCABULARY, assert_all_gone, log_probs, tiny_model, traces
from tests.gpu.common import log_probs as log_probs_of_learner
from tests.gpu.common import prepared, random_batch
from tests.gpu.engine import MODEL, recipe_for, served
from tests.gpu.parity import COMMON
from tests.weights import TensorSource

ROOT = Path(__file__).parents[2]
MAX_MODEL_LEN = 300  # more than two of vLLM's blocks of 128 tokens, which are what its prefix cache keeps
PROBE = [2 + 7 * i * i % (VOCABULARY - 2) for i in range(60)]
FAULTY = ["--worker-extension-cls", "tests.e2e.faults.FaultyWorker"]
FAULTY += ["--scheduler-cls", "tests.e2e.faults.FaultyScheduler"]


# --- engines


@dataclass(frozen=True)
class Combination:
    dtype: str
    tied: bool
    tp: int

    @property
    def family(self) -> str:
        """Norms of queries and keys in one, biases of them in the other."""
        return "qwen3" if self.tied else "qwen2"

    @property
    def transport(self) -> str:
        return "shm" if self.tp == 1 else "collective"

    def __str__(self) -> str:
        return f"{self.dtype}-{'tied' if self.tied else 'untied'}-tp{self.tp}"


COMBINATIONS = [
    Combination(dtype, tied, tp) for dtype in ("float32", "bfloat16") for tied in (True, False) for tp in (1, 2)
]
ONE, TWO = Combination("float32", True, 1), Combination("bfloat16", False, 2)
RATES = (1e-3, 1e-6)


class Training:
    """Weights under updates like Adam's, in which every element of the fp32 main weights moves by the learning rate,
    and as they are sent: in the engine's type.

    changed: of each tensor, in the last update, which elements are others as they are sent.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, rate: float):
        self.model, self._dtype, self._rate = model, dtype, rate
        self._random = torch.Generator().manual_seed(1)
        self.sent = self._rounded()
        self.changed: dict[str, Tensor] = {}

    def step(self) -> None:
        old = self.sent
        with torch.no_grad():
            for value in self.model.parameters():
                value.add_(self._rate * (2 * torch.randint(2, value.shape, generator=self._random) - 1))
        self.sent = self._rounded()
        self.changed = {name: value != old[name] for name, value in self.sent.items()}
        if self._dtype == torch.bfloat16 and self._rate == 1e-6:
            bits = [(value.view(torch.int16) - old[name].view(torch.int16)).abs() for name, value in self.sent.items()]
            moved = torch.cat([each.flatten() for each in bits])
            assert 0 < moved.count_nonzero() < 0.01 * len(moved) and moved.max() == 1

    def _rounded(self) -> dict[str, Tensor]:
        return {name: value.detach().to(self._dtype, copy=True) for name, value in self.model.named_parameters()}


class Bench:
    """An engine that can be made faulty, and what it is sent."""

    def __init__(self, combination: Combination, folder: Path):
        self.combination = combination
        self.model().save_pretrained(folder / "model")
        options = {"tp": combination.tp, "dtype": combination.dtype, "kv_cache_gib": 0.1, "prefix_caching": True}
        config = RolloutConfig(**options, extra_args=FAULTY)  # a later argument wins
        server = VLLMServer(
            config,
            folder / "model",
            log_path=folder / "vllm.log",
            seed=0,
            max_model_len=MAX_MODEL_LEN,
            load_format="dummy",
        )
        self.engine = Engine(server, timeout_s=120)
        self.version = 0
        self.is_usable = True
        self.training = Training(self.model(), getattr(torch, combination.dtype), RATES[0])
        self.start()

    def model(self) -> PreTrainedModel:
        """Weights so far from 0 that bf16 steps are more than 100 times 1e-6."""
        model = tiny_model(self.combination.family, self.combination.tied, seed=0)
        model.config.max_position_embeddings = 2 * MAX_MODEL_LEN
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.03 * value.sign())
        return model

    def start(self) -> None:
        self.engine.start()
        self.is_usable = True
        self.switch_fault()
        self.introduce()

    def train_at(self, rate: float) -> Training:
        self.training = Training(self.model(), getattr(torch, self.combination.dtype), rate)
        return self.training

    def introduce(self, timeout_s: float = 120.0) -> None:
        """The next sync is the engine's first, as far as it knows."""
        self.weights = WeightSync(
            TensorSource(self.training.sent),
            [self.engine],
            transport=self.combination.transport,
            timeout_s=timeout_s,
        )
        self.engine.connect(self.weights.init_info)

    def sync(self, source: TensorSource | None = None) -> None:
        self.version += 1
        self.weights.source = source or TensorSource(self.training.sent)
        self.weights.sync(self.version)

    def switch_fault(self, name: str = "", tensors: str = "", rank: str = "") -> None:
        body = {"method": "switch_fault", "args": [name, tensors, rank]}
        results = self.engine.client._call("POST", "/collective_rpc", body)["results"]
        assert len(results) == self.combination.tp

    def assert_computes_with(self, training: Training) -> None:
        if self.combination.dtype == "float32":
            (ours,), theirs = self.engine.client.score([PROBE]), log_probs(training.model, PROBE)
            assert max(abs(one - other) for one, other in zip(ours, theirs, strict=True)) < 1e-4


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One engine for all cases of its combination, one at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        bench = Bench(request.param, tmp_path_factory.mktemp("faulty"))
    yield bench
    bench.engine.stop()


@pytest.fixture
def usable(bench: Bench) -> Bench:
    if not bench.is_usable:
        bench.start()
    return bench


def engines(*default: Combination, among: Callable[[Combination], bool] = lambda combination: True) -> Any:
    """One case for each combination: by default for these, and for the others in full."""
    cases = [
        pytest.param(each, id=str(each), marks=[] if each in default else pytest.mark.full)
        for each in COMBINATIONS
        if among(each)
    ]
    return pytest.mark.parametrize("bench", cases, indirect=True)


# --- faults


@dataclass(frozen=True)
class Fault:
    """what: in `faults.FAULTS`. named: what the error says. tensors: that it is about; a pattern: one of those that the
    update changes. rank: of the worker that has it (all). first: in the first sync that the engine knows of, in which
    it is learned where vLLM puts what; else in the third."""

    what: str
    named: str
    tensors: str = ""
    rank: str = ""
    first: bool = False

    def __str__(self) -> str:
        tensors = "-".join(re.sub(r"model\.|layers\.|\.weight", "", name) for name in self.tensors.split(",") if name)
        words = [self.what, tensors, self.rank and f"worker{self.rank}", "first" if self.first else ""]
        return "-".join(word for word in words if word)


def in_both(what: str, named: str, tensors: str = "", rank: str = "") -> list[Fault]:
    return [Fault(what, named, tensors, rank, first) for first in (True, False)]


def of(module: str, layer: int = 1) -> str:
    return f"model.layers.{layer}.{module}.weight"


EMBEDDING = "model.embed_tokens.weight"
Q, K, V, OUT = (of(f"self_attn.{part}_proj") for part in "qkvo")
GATE, UP, DOWN = (of(f"mlp.{part}_proj") for part in ("gate", "up", "down"))
OTHER_DOWN = of("mlp.down_proj", layer=0)
BIAS, NORM = "*_proj.bias", "*norm.weight"
ANY = r"model\.\S+"
QKV = of("self_attn.qkv_proj")

FAULTS = [
    # the update is not applied
    *in_both("ignored", ANY),
    *in_both("not_loaded", ANY),
    Fault("report_replayed", ANY),
    Fault("not_finalized", EMBEDDING),
    # one tensor is not
    *(fault for name in (Q, DOWN, EMBEDDING, NORM) for fault in in_both("not_copied", name, name)),
    *(fault for name in (Q, OUT, EMBEDDING) for fault in in_both("skipped", f"{name}|{QKV}", name)),
    *(Fault("half_the_rows", name, name) for name in (DOWN, GATE, EMBEDDING)),
    # it has other values
    *(Fault("one_version_old", name or ANY, name) for name in ("", DOWN, K, EMBEDDING, NORM)),
    *(Fault("two_versions_old", name or ANY, name) for name in ("", DOWN)),
    *(fault for name in (DOWN, K, EMBEDDING) for fault in in_both("byte_in_slot", name, name)),
    *(fault for name in (DOWN, K, EMBEDDING, NORM) for fault in in_both("byte_in_clone", name, name)),
    *in_both("other_in_clone", DOWN, DOWN),
    # it is at another place
    *in_both("exchanged", DOWN, f"{OTHER_DOWN},{DOWN}"),
    *in_both("exchanged", V, f"{K},{V}"),
    *in_both("exchanged", UP, f"{GATE},{UP}"),
    # layers compute with an old copy
    *in_both("head_not_packed", "lm_head"),
    *in_both("packed_copy_kept", ANY),
    *in_both("packed_copy_kept", r"layers\.1\.self_attn\.qkv_proj computes with", Q),
    *in_both("packed_copy_kept", DOWN, DOWN),
    Fault("packed_copy_half_kept", DOWN, DOWN, first=True),
    *in_both("layer_computes_with_copy", DOWN, DOWN),
    # what was computed with older weights is kept
    Fault("cache_kept", "256 tokens of a prompt in its prefix cache, of older weights"),
]
CORNERS = [  # of them, for an engine of two workers, on which every sync takes ten times as long here
    *(fault for fault in FAULTS if fault.what in ("ignored", "head_not_packed", "cache_kept")),
    *(fault for fault in FAULTS if fault.what == "not_copied" and fault.tensors in (DOWN, NORM) and not fault.first),
    *(fault for fault in FAULTS if fault.what == "skipped" and fault.tensors == OUT and not fault.first),
    *(fault for fault in FAULTS if fault.what == "exchanged" and fault.named == UP),
    *(fault for fault in FAULTS if fault.what == "one_version_old" and fault.tensors in ("", K, EMBEDDING)),
    *(fault for fault in FAULTS if fault.what in ("byte_in_slot", "byte_in_clone") and fault.tensors == K),
    *(fault for fault in FAULTS if fault.what == "packed_copy_kept" and fault.tensors == DOWN),
]
OF_TWO_WORKERS = [
    *(fault for name in (Q, UP, DOWN) for fault in in_both("others_slice", name, name)),
    *in_both("others_slice", f"worker 1 .*{DOWN}", DOWN, rank="1"),
    *in_both("ignored", f"worker 1 .*{ANY}", rank="1"),
    *in_both("packed_copy_kept", f"worker 1 .*{DOWN}", DOWN, rank="1"),
    Fault("one_version_old", f"worker 1 .*{DOWN}", DOWN, rank="1"),
]
OF_BIASES = [Fault("one_version_old", BIAS, BIAS), Fault("half_the_rows", BIAS, BIAS)]


def at_rates(faults: list[Fault]) -> Any:
    """By default the updates of which hardly anything is left after rounding, in full larger ones too."""
    cases = [
        pytest.param(rate, fault, id=f"{rate:g}-{fault}", marks=[] if rate == min(RATES) else pytest.mark.full)
        for rate in RATES
        for fault in faults
    ]
    return pytest.mark.parametrize(("rate", "fault"), cases)


@engines(ONE, TWO)
@at_rates(CORNERS)
def test_a_fault_is_caught_and_named_by_its_sync(usable: Bench, rate: float, fault: Fault) -> None:
    catch(usable, rate, fault)


@engines(ONE)
@at_rates([fault for fault in FAULTS if fault not in CORNERS])
def test_more_faults(usable: Bench, rate: float, fault: Fault) -> None:
    catch(usable, rate, fault)


@engines(TWO, among=lambda combination: combination.tp == 2)
@at_rates(OF_TWO_WORKERS)
def test_a_fault_of_two_workers(usable: Bench, rate: float, fault: Fault) -> None:
    catch(usable, rate, fault)


@engines(TWO, among=lambda combination: combination.family == "qwen2")
@at_rates(OF_BIASES)
def test_a_fault_of_a_bias(usable: Bench, rate: float, fault: Fault) -> None:
    catch(usable, rate, fault)


def catch(bench: Bench, rate: float, fault: Fault) -> None:
    """The sync with the fault says what is wrong and serves nothing; the next one, without it, makes all good."""
    training = bench.train_at(rate)
    bench.introduce()
    if not fault.first:
        for _ in range(2):
            bench.sync()
            training.step()
    tensors = tensors_that_changed(bench, fault)
    bench.switch_fault(fault.what, ",".join(tensors), fault.rank)
    named = "|".join(map(re.escape, tensors)) if "*" in fault.tensors else fault.named
    try:
        with pytest.raises(SyncError, match=named):
            bench.sync()
        assert bench.engine.client.is_paused()
    finally:
        bench.switch_fault()
    training.step()
    bench.sync()
    bench.assert_computes_with(training)


def tensors_that_changed(bench: Bench, fault: Fault) -> list[str]:
    """The fault's tensors, after an honest sync of the weights before an update that changes them: a tensor that does
    not change is never stale, and norms seldom do in bf16."""
    training, before = bench.training, None
    for _ in range(100):
        found = []
        for pattern in fault.tensors.split(",") if fault.tensors else []:
            names = [name for name in training.sent if fnmatch(name, pattern)]
            assert names
            found.append(next((name for name in names if has_changed(training, name, fault.what)), ""))
        if all(found):
            if before is not None:
                bench.sync(TensorSource(before))
            return found
        before = training.sent
        training.step()
    raise AssertionError(f"no update changed {fault.tensors}")


def has_changed(training: Training, name: str, what: str) -> bool:
    if not training.changed:
        return True
    changed = training.changed[name]
    return bool(changed[: len(changed) // 2].any() if what == "half_the_rows" else changed.any())


@engines(ONE, TWO)
@pytest.mark.parametrize(
    ("rate", "num_syncs"),
    [(rate, 10) for rate in RATES] + [pytest.param(rate, 200, marks=pytest.mark.full) for rate in RATES],
)
def test_honest_syncs_pass(usable: Bench, rate: float, num_syncs: int) -> None:
    bench, training = usable, usable.train_at(rate)
    bench.introduce()
    for _ in range(num_syncs):
        bench.sync()
        bench.assert_computes_with(training)
        training.step()


@pytest.mark.full
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_200_syncs_of_a_learner_pass(dtype: str, rate: float, tmp_path: Path) -> None:
    """Stage 2's own learner replays a batch, and an engine is given its weights after every step."""
    (tmp_path / "config.json").write_text(json.dumps(COMMON | MODEL))
    settings = argparse.Namespace(tiny=dtype == "float32", quick=True, overrides=[f"optimizer.lr={rate}"])
    recipe, spec = recipe_for(tmp_path, settings), read_hf_config(tmp_path)
    with alone() as topology:
        learner = prepared(recipe, spec, topology)
        batch = random_batch(spec, [(1, 40), (9, 33), (30, 60), (17, 2)])
        with served(recipe, tmp_path, WeightStream(learner.policy, spec, topology), topology.device) as server:
            for version in range(200):
                server.sync(version)
                learner.learn(batch, no_values(batch))
            server.sync(200)
            theirs = server.score([batch.sequences.row(row).tolist() for row in range(len(batch))])
        ours = log_probs_of_learner(learner, batch.sequences)
    worst = max(float((Tensor(one)[-len(own) :] - own).abs().max()) for one, own in zip(theirs, ours, strict=True))
    assert worst <= recipe.sync.tolerance(recipe.model, recipe.rollout).max


# --- who dies


class BrokenSource(TensorSource):
    """After the first bucket something happens."""

    def __init__(self, tensors: dict[str, Tensor], happens: Callable[[], None]):
        super().__init__(tensors)
        self._happens = happens

    def buckets(self, *arguments: Any, **options: Any) -> Iterator[tuple[Bucket, Tensor]]:
        for index, item in enumerate(super().buckets(*arguments, **options)):
            if index == 1:
                self._happens()
            yield item


@engines(ONE)
def test_a_trainer_that_fails_ends_the_update(usable: Bench) -> None:
    bench = usable
    bench.sync()
    threads, bench.is_usable = set(threading.enumerate()), False

    def fail() -> None:
        raise RuntimeError("no memory is left")

    start = time.monotonic()
    with pytest.raises(SyncError, match="the trainer's weights could not be gathered: no memory is left"):
        bench.sync(BrokenSource(bench.training.sent, fail))
    assert time.monotonic() - start < 10
    assert bench.engine.client.is_paused()
    assert set(threading.enumerate()) == threads
    assert [path.name for path in bench.engine.payload_dir.iterdir()] == ["buckets"]


@engines(ONE, TWO)
@pytest.mark.parametrize(
    "after", ["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_a_transfer_that_breaks_off_is_made_anew(usable: Bench, after: str) -> None:
    """On the last worker: in the middle of vLLM's qkv, at the begin, and when nearly all is there. vLLM alone would mix
    what it has with what comes next, or refuse to go on."""
    bench, training = usable, usable.train_at(RATES[0])
    bench.introduce()
    for _ in range(2):
        bench.sync()
        training.step()
    bench.switch_fault("breaks_off", after, str(bench.combination.tp - 1))
    bench.sync()
    bench.assert_computes_with(training)
    training.step()
    bench.sync()
    bench.assert_computes_with(training)
    assert bench.engine.state is State.SERVING and bench.engine.failure is None
    assert bench.engine.client.weight_version() == str(bench.version)


@engines(ONE, TWO)
def test_a_transfer_that_always_breaks_off_ends_the_run(usable: Bench) -> None:
    bench = usable
    bench.introduce()
    bench.switch_fault("always_breaks_off", "model.norm.weight")
    with pytest.raises(SyncError, match="^the weights could not be sent, twice: "):
        bench.sync()
    assert bench.engine.client.is_paused() and bench.engine.state is State.STARTED
    bench.switch_fault()
    bench.sync()
    bench.assert_computes_with(bench.training)


@engines(ONE, TWO)
def test_an_engine_that_falls_silent_in_an_update_is_named_in_time(usable: Bench) -> None:
    bench = usable
    bench.sync()
    threads, bench.is_usable = set(threading.enumerate()), False
    timeout_s = 6.0
    bench.introduce(timeout_s)
    server = bench.engine.server
    assert isinstance(server, VLLMServer)
    everything = traces(server.pids())
    core = next(pid for pid in server.pids() if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text())
    start = time.monotonic()
    with pytest.raises(ServerDied, match=r"\(sync\.timeout_s(=6)?\)$"):
        bench.sync(BrokenSource(bench.training.sent, lambda: os.kill(core, signal.SIGSTOP)))
    took_s = time.monotonic() - start
    print(f"{bench.combination}: named after {took_s:.1f} s of {timeout_s:g}")
    assert took_s < timeout_s + 2
    bench.engine.stop()
    assert_all_gone(everything)
    assert set(threading.enumerate()) <= threads


@engines(TWO)
def test_an_engine_that_is_killed_in_an_update(usable: Bench) -> None:
    bench = usable
    bench.sync()
    threads, bench.is_usable = set(threading.enumerate()), False
    server = bench.engine.server
    assert isinstance(server, VLLMServer)
    everything = traces(server.pids())
    (core,) = (pid for pid in server.pids() if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text())
    start = time.monotonic()
    with pytest.raises(ServerDied):
        bench.sync(BrokenSource(bench.training.sent, lambda: os.kill(core, signal.SIGKILL)))
    assert time.monotonic() - start < 30
    bench.engine.stop()
    assert_all_gone(everything)
    assert set(threading.enumerate()) <= threads
