"""Starts, watches and stops one vLLM server: `with VLLMServer(recipe.rollout, model, ...) as server: ...`

The server is `python -m megatron_apo.rollout.api_server`, vLLM's own API server (see there), in any interpreter that
has vLLM and this package. It runs under `guard.py`, so that no exit of this process, SIGKILL included, leaves one of
its processes, its shared memory or its folders behind.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_apo.config import RolloutConfig
from megatron_apo.model.hf_config import ModelSpec, read_hf_config
from megatron_apo.rollout.vllm_plugin import BACKEND, TOKEN_VARIABLE
from megatron_apo.runtime import guard
from megatron_apo.runtime.gpus import drivers_gpus, gpu_names, visible_gpus
from megatron_apo.runtime.job import is_below_node, without_job
from megatron_apo.runtime.ports import free_port, try_port

LOG_TAIL_LINES = 30
STOP_LIMIT_S = 15.0
# Set by torchrun or our launcher for this process alone, beside what says that it is a rank.
LAUNCHER_VARIABLES = ("OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE")


class ServerError(RuntimeError):
    """The rollout server could not be started, or refused a request."""


class ServerDied(ServerError):
    """The rollout server is gone, or its engine is."""


class VLLMServer:
    """One vLLM engine replica behind HTTP.

    `url`, `token` (bearer, on every request) and `payload_dir` (private folder for the `shm` transport, removed with
    the server) hold from `start` to `stop`. A stopped server can be started again, with a new port and token.
    """

    def __init__(
        self,
        rollout: RolloutConfig,
        model: Path,
        *,
        log_path: Path,
        seed: int,
        max_model_len: int,
        shm_dir: Path | None = None,
        replica: int | None = None,
        load_format: str = "auto",
    ):
        """`model`: HF folder. `max_model_len`: longest prompt + response, tokens. `shm_dir`: parent of `payload_dir`
        (None: /dev/shm). `log_path` is appended to. `replica`: which of `rollout.replicas` on this machine it is, with
        cores or GPUs and a port of its own (None: it is alone here). `load_format`: vLLM's; "dummy" starts with
        weights that are nobody's, which the first sync replaces, so that one that moves nothing is seen."""
        self.rollout = rollout
        self.model = model
        self.log_path = log_path
        self.seed = seed
        self.max_model_len = max_model_len
        self.shm_dir = shm_dir or Path("/dev/shm")
        self.replica = replica
        self.load_format = load_format
        self.process: subprocess.Popen[bytes] | None = None
        self.url = self.token = ""
        self.payload_dir = Path()

    def start(self) -> None:
        """Start and wait until the server answers. Raises ServerError, with the log's last lines if there are any."""
        assert self.process is None, "the server is already started"
        if not (self.model / "config.json").is_file():
            raise ServerError(f"model: {self.model} has no config.json; give a Hugging Face folder")
        wanted = self.rollout.port and self.rollout.port + (self.replica or 0)
        port = _port(self.rollout.host, wanted)
        command = self._command(port)
        self.url = f"http://{advertised_host(self.rollout)}:{port}"
        self.token = secrets.token_urlsafe(32)
        self.shm_dir.mkdir(parents=True, exist_ok=True)
        self.payload_dir = guard.unused_name("megatron-apo-", self.shm_dir)
        scratch = guard.unused_name("apo-")  # sockets; their paths have at most 107 characters
        self._folders = [self.payload_dir, scratch]
        watch = [sys.executable, "-I", guard.__file__, f"--parent={os.getpid()}"]
        watch += [*(f"--folder={folder}" for folder in self._folders), *(["--deaf"] if is_below_node() else []), "--"]
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self.log_start = log.tell()
            self.process = subprocess.Popen(
                watch + command,
                env=self._environment(scratch),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the trainer, which then stops the server
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every process of the server. Returns at once when it is not running. From any thread, also while another
        is in `start`, which then raises."""
        if (process := self.process) is None:
            return
        process.terminate()
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            guard.end_all(lambda: [pid for pid in self.pids() if not guard.is_zombie(pid)])
            process.wait()
        for folder in self._folders:  # a guard that was killed has not removed them
            shutil.rmtree(folder, ignore_errors=True)
        self.process = None

    @property
    def cache_probe_tokens(self) -> int:
        return cache_probe_tokens(self.rollout, self.max_model_len)

    @property
    def can_start(self) -> bool:
        return True

    @property
    def is_gone(self) -> bool:
        """Its guard has ended it: the folder goes last."""
        return not self.payload_dir.exists()

    def alive(self) -> bool:
        return (process := self.process) is not None and process.poll() is None

    def pids(self) -> list[int]:
        """Every process of the server (for memory accounting)."""
        return [pid, *guard.descendants(pid)] if (pid := self.pid) is not None else []

    @property
    def pid(self) -> int | None:
        """The server's root process."""
        return process.pid if (process := self.process) is not None else None

    def log_tail(self) -> str:
        """The last lines that this start of the server logged."""
        with self.log_path.open("rb") as log:
            log.seek(self.log_start)
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def __enter__(self) -> VLLMServer:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _wait_until_ready(self) -> None:
        process = self.process
        assert process is not None
        request = urllib.request.Request(f"{self.url}/health", headers={"Authorization": f"Bearer {self.token}"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy must not see the token
        end = time.monotonic() + self.rollout.start_timeout_s
        while time.monotonic() < end:
            if (status := process.poll()) is not None:
                raise ServerError(
                    f"vLLM ended with status {status} at its start; {self.log_path} ends:\n{self.log_tail()}"
                )
            try:
                with opener.open(request, timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        limit = f"rollout.start_timeout_s={self.rollout.start_timeout_s:g}"
        raise ServerError(f"vLLM did not answer within {limit}; {self.log_path} ends:\n{self.log_tail()}")

    def _command(self, port: int) -> list[str]:
        rollout = self.rollout
        arguments = {
            "model": self.model,
            "served-model-name": "policy",
            "host": rollout.host,
            "port": port,
            "seed": self.seed,
            "load-format": self.load_format,
            "max-model-len": served_length(rollout, self.model, self.max_model_len),
            "logprobs-mode": "processed_logprobs",  # of the distribution that was sampled from: after the temperature
            "weight-transfer-config": json.dumps({"backend": BACKEND}),
            "worker-extension-cls": "megatron_apo.rollout.transport.receiver.WorkerExtension",
            "middleware": "megatron_apo.rollout.vllm_plugin.TokenCheck",
            "uvicorn-log-level": "warning",
        }
        command = [rollout.python or sys.executable, "-m", "megatron_apo.rollout.api_server"]
        command += [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
        for name, value in engine_options(rollout).items():
            flag = name.replace("_", "-")
            command += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
        command += [
            "--enable-scale-out",  # /inference/v1/generate
            "--skip-tokenizer-init",  # token ids in, token ids out
            "--enable-prompt-tokens-details",  # how many were in the prefix cache
            f"--{'' if rollout.prefix_caching else 'no-'}enable-prefix-caching",  # emptied by each sync's pause
            *(["--enable-sleep-mode"] if rollout.sleep_while_training else []),
            "--disable-log-stats",
            "--disable-uvicorn-access-log",
            "--disable-fastapi-docs",
        ]
        return command + rollout.extra_args

    def _environment(self, scratch: Path) -> dict[str, str]:
        own = {
            TOKEN_VARIABLE: self.token,
            "TMPDIR": str(scratch),
            "HF_HUB_OFFLINE": "1",  # the model is a folder
            "VLLM_SERVER_DEV_MODE": "1",  # the weight-transfer routes; the token check guards them
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",  # connections outlive the trainer's part of a step
        }
        return engine_environment(os.environ | own, self.rollout, self.replica)


def log_file(log_name: str, number: int, count: int) -> str:
    """Of engine `number` of so many."""
    return f"{log_name}.log" if count == 1 else f"{log_name}-{number}.log"


def cache_probe_tokens(rollout: RolloutConfig, max_model_len: int) -> int:
    """Length of a prompt that shows what an engine's prefix cache holds: more than a block of tokens (128 on a CPU, 16
    on a GPU), where there are such prompts. 0 where there is nothing to look at: without a cache, and where vLLM sleeps
    while weights are synced, which drops the cache and its memory."""
    if not rollout.prefix_caching or rollout.sleep_while_training:
        return 0
    return min(2 * 128 + 1, max_model_len - 1)


def engine_options(rollout: RolloutConfig) -> dict[str, Any]:
    """Arguments of vLLM's engine that both stages give it, by vLLM's names."""
    on_gpu = _has_gpu(rollout)
    options: dict[str, Any] = {
        "dtype": rollout.dtype,
        "max_num_seqs": rollout.max_num_seqs,
        "max_num_batched_tokens": rollout.max_num_batched_tokens,
        "kv_cache_memory_bytes": int(rollout.kv_cache_gib * 2**30),
        "tensor_parallel_size": rollout.tp,
        "generation_config": "vllm",  # no sampling default from the model's folder
        "enable_chunked_prefill": on_gpu,  # a seeded request prefilled in two pieces kills the CPU engine
        "enforce_eager": not on_gpu,  # compiling costs more than it gains on a CPU
        "kv_cache_dtype": rollout.kv_cache_dtype,
        "enable_expert_parallel": rollout.ep > 1,
    }
    if problems := engine_problems(rollout):
        raise ValueError("\n".join(problems))
    if rollout.quantization:
        options["quantization"] = rollout.quantization
    if on_gpu:
        # With kv_cache_memory_bytes it is only what must be free at the start (v1/worker/utils.py, `request_memory`);
        # vLLM's own 0.92 leaves no room for a trainer.
        options["gpu_memory_utilization"] = rollout.gpu_memory_utilization
    return options


def engine_problems(rollout: RolloutConfig, on_gpu: bool | None = None) -> list[str]:
    """Settings that need a GPU, where there is none, one line each. on_gpu: whether there is; None: look here."""
    if _has_gpu(rollout) if on_gpu is None else on_gpu:
        return []
    wanted = {"quantization": "fp8", "kv_cache_dtype": "fp8", "sleep_while_training": True}
    found = [
        f"rollout.{name}: {str(value).lower()} needs a GPU, and this machine has none; leave it out"
        for name, value in wanted.items()
        if getattr(rollout, name) == value
    ]
    if rollout.ep > 1:  # model_executor/layers/fused_moe/experts/cpu_moe.py, `apply`, reads past its own experts
        found.append(f"rollout.ep: {rollout.ep} needs a GPU, since vLLM's CPU experts take no expert map; use 1")
    return found


def device_name() -> str:
    """What vLLM runs on in this interpreter, e.g. "NVIDIA H200" or "CPU"."""
    return gpu_names()[0] if visible_gpus() else "CPU"


def engine_environment(
    inherited: Mapping[str, str], rollout: RolloutConfig, replica: int | None = None
) -> dict[str, str]:
    """What a process with a vLLM engine of these settings is started with: torch and OpenMP look once, when loaded.

    replica: which of `rollout.replicas` it is, with GPUs or cores of its own; None: it has those of all.
    """
    # vLLM would take a rank's place in our job for one in its own.
    environment = {name: value for name, value in without_job(inherited).items() if name not in LAUNCHER_VARIABLES}
    environment.pop("VLLM_RPC_BASE_PATH", None)  # so that its sockets lie in TMPDIR
    environment |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
    if _has_gpu(rollout):
        return environment | ({} if replica is None else own_gpus(environment, rollout.tp, replica))
    return environment | _cpu_environment(rollout, replica)


def own_gpus(environment: Mapping[str, str], tp: int, replica: int, count: int | None = None) -> dict[str, str]:
    """The GPUs of one replica: `tp` in a row of those that CUDA_VISIBLE_DEVICES leaves. count: how many these are, for
    a machine that is not here."""
    count = len(drivers_gpus()) if count is None else count
    names = environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")[:count]
    own = names[replica * tp : (replica + 1) * tp]
    if len(own) < tp:
        raise ServerError(f"rollout.replicas: no GPUs are left for engine {replica} of rollout.tp={tp}: {count} here")
    return {"CUDA_VISIBLE_DEVICES": ",".join(name.strip() for name in own)}


def _cpu_environment(rollout: RolloutConfig, replica: int | None) -> dict[str, str]:
    """Give each worker its threads, and let idle ones sleep: trainer and rollouts take turns on the same cores."""
    cores = sorted(os.sched_getaffinity(0))
    tp, replicas = rollout.tp, 1 if replica is None else rollout.replicas
    per_worker = rollout.threads or max(1, len(cores) // (tp * replicas))
    # vLLM compiles its sampler whatever --enforce-eager says: 15 s of the first call, for nothing.
    shared = {"OMP_WAIT_POLICY": "PASSIVE", "TORCH_COMPILE_DISABLE": "1"}
    if tp == 1:
        # The worker lives in the engine core: one process fewer to start, and no shared-memory queue between the two,
        # whose reader spins for a second after each message (distributed/device_communicators/shm_broadcast.py:139).
        return shared | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(per_worker)}
    first = (replica or 0) * tp
    workers = range(first, first + tp)
    groups = [[cores[(worker * per_worker + i) % len(cores)] for i in range(per_worker)] for worker in workers]
    bind = "|".join(",".join(map(str, dict.fromkeys(group))) for group in groups)
    return shared | {"VLLM_CPU_OMP_THREADS_BIND": bind}


def engine_gpus(rollout: RolloutConfig) -> int:
    """How many GPUs of this machine engines can have."""
    return len(drivers_gpus() if rollout.python else visible_gpus())


def engines_here(rollout: RolloutConfig) -> int:
    """How many workers with an engine this machine's GPUs have room for; without a GPU `rollout.replicas`."""
    return max(1, engine_gpus(rollout) // rollout.tp) if _has_gpu(rollout) else rollout.replicas


def sharing_cores(rollout: RolloutConfig, count: int) -> RolloutConfig:
    """The settings of one of `count` workers on this machine, which without a GPU share its cores."""
    threads = rollout.threads or max(1, len(os.sched_getaffinity(0)) // (rollout.tp * count))
    return rollout if _has_gpu(rollout) else rollout.model_copy(update={"threads": threads})


def _has_gpu(rollout: RolloutConfig) -> bool:
    return engine_gpus(rollout) > 0


def served_length(rollout: RolloutConfig, model: Path, max_model_len: int, on_gpu: bool | None = None) -> int:
    """`longest_request`. Raises `ValueError` also where the KV cache cannot hold one, with what can.

    on_gpu: whether the engine has GPUs; None: look here.
    """
    longest = longest_request(model, max_model_len)
    on_gpu = _has_gpu(rollout) if on_gpu is None else on_gpu
    if not on_gpu and rollout.max_num_batched_tokens < longest:  # prefills are whole there
        raise ValueError(
            f"rollout.max_num_batched_tokens: {rollout.max_num_batched_tokens} is less than a whole sequence of "
            f"data.max_prompt_tokens + sampling.max_response_tokens, and without a GPU a prefill is whole; use at "
            f"least {longest}"
        )
    least = _least_kv_cache_bytes(rollout, read_hf_config(model), longest)
    if rollout.kv_cache_gib * 2**30 < least:
        raise ValueError(
            f"rollout.kv_cache_gib: {rollout.kv_cache_gib:g} cannot hold one sequence of data.max_prompt_tokens + "
            f"sampling.max_response_tokens ({max_model_len}); use at least {math.ceil(least / 2**30 * 100) / 100:g}"
        )
    return longest


def _least_kv_cache_bytes(rollout: RolloutConfig, spec: ModelSpec, tokens: int) -> int:
    """Keys and values of one sequence on one of the engine's workers, each of which holds at least one head.

    Of whole blocks of 128 tokens, the CPU's (platforms/cpu.py) and the largest of a GPU's, and one that vLLM keeps to
    itself (v1/core/block_pool.py, `null_block`).
    """
    width = 1 if rollout.kv_cache_dtype == "fp8" else 4 if rollout.dtype == "float32" else 2
    heads = max(1, spec.num_query_groups // rollout.tp)
    return 2 * spec.num_layers * heads * spec.head_dim * width * 128 * (-(-tokens // 128) + 1)


def longest_request(model: Path, max_model_len: int) -> int:
    """One token more than the longest sequence, where the model has room: scoring a sequence generates one token.

    Raises `ValueError` for sequences that the model has no room for.
    """
    limit = read_hf_config(model).max_positions
    if max_model_len > limit:
        raise ValueError(
            f"data.max_prompt_tokens + sampling.max_response_tokens: {max_model_len}, but {model} has "
            f"max_position_embeddings {limit}; lower one of them"
        )
    return min(max_model_len + 1, limit)


def advertised_host(rollout: RolloutConfig) -> str:
    """Under which name others reach a server, as it stands in a URL."""
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # all interfaces is no address; whoever asks is on this machine
    host = rollout.advertise_host or everywhere.get(rollout.host, rollout.host)
    return f"[{host}]" if ":" in host else host


def _port(host: str, wanted: int) -> int:
    """`wanted`, or a free port for 0. Raises ServerError when it cannot be listened on."""
    try:
        if not wanted:
            return free_port(host)
        try_port(host, wanted)
    except OSError as error:
        where = f"{host}:{wanted}" if wanted else host
        raise ServerError(f"rollout.port: cannot listen on {where}: {error.strerror}; use another, or 0") from None
    return wanted
