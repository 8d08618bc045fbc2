"""vLLM's engines: where they are, and what they compute in."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_apo.config.base import MAY_CHANGE, SAME_IN_ALL_SHARDS, Section


class RolloutConfig(Section):
    placement: Literal["colocated", "dedicated"] = Field(
        "colocated",
        json_schema_extra=MAY_CHANGE,
        description="stage 2's engines: colocated: spread over the machines of the trainer's ranks; dedicated: on "
        "machines of their own, each of which runs `megatron-apo serve`",
    )
    replicas: int = Field(
        1,
        ge=1,
        json_schema_extra=MAY_CHANGE,
        description="vLLM engines, each of tp GPUs (CPU: workers) of its own on one machine; colocated ones are spread "
        "over the trainer's machines",
    )
    driver: str | None = Field(
        None,
        json_schema_extra=MAY_CHANGE,
        description="HOST:PORT where rank 0 takes in machines with engines; for dedicated ones",
    )
    host: str = Field(
        "127.0.0.1", json_schema_extra=MAY_CHANGE, description="interface an engine binds to; keep it private"
    )
    advertise_host: str | None = Field(
        None,
        min_length=1,
        json_schema_extra=MAY_CHANGE,
        description="address by which engines are reached; none: rollout.host, or this machine",
    )
    port: int = Field(
        0,
        ge=0,
        le=65535,
        json_schema_extra=MAY_CHANGE,
        description="of the first engine, the next ones follow; 0: free ports",
    )
    python: str | None = Field(
        None, json_schema_extra=MAY_CHANGE, description="Python interpreter that has vLLM; none: this one"
    )
    tp: int = Field(1, ge=1, description="vLLM's tensor-parallel size")
    ep: int = Field(
        1,
        ge=1,
        description="vLLM's expert-parallel size, for mixtures: 1, or tp, whose workers then share out experts",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", json_schema_extra=SAME_IN_ALL_SHARDS, description="vLLM's compute type"
    )
    max_num_seqs: int = Field(256, ge=1, description="sequences vLLM decodes at once")
    max_num_batched_tokens: int = Field(
        16384, ge=64, description="tokens of one vLLM step; without a GPU it holds a whole sequence"
    )
    kv_cache_gib: float = Field(
        1.0,
        gt=0,
        json_schema_extra=MAY_CHANGE,
        description="KV cache on each of the engine's tp GPUs (CPU: workers), GiB",
    )
    kv_cache_dtype: Literal["auto", "fp8"] = Field(
        "auto", json_schema_extra=SAME_IN_ALL_SHARDS, description="fp8 halves the KV cache; GPU only"
    )
    quantization: Literal["fp8"] | None = Field(
        None, json_schema_extra=SAME_IN_ALL_SHARDS, description="vLLM's weights in FP8; GPU only"
    )
    prefix_caching: bool = Field(
        False,
        description="stage 2's samples of a prompt share its prefill until the next sync; their numbers then depend on "
        "which came first (stage 1: vstar.prefix_caching)",
    )
    sleep_while_training: bool = Field(
        False,
        json_schema_extra=MAY_CHANGE,
        description="vLLM drops its KV cache and keeps its weights in host memory while the trainer computes; GPU only",
    )
    gpu_memory_utilization: float = Field(
        0.5,
        gt=0,
        le=1,
        json_schema_extra=MAY_CHANGE,
        description="share of a GPU that must be free when vLLM starts; without meaning on a CPU",
    )
    threads: int | None = Field(
        None, ge=1, json_schema_extra=MAY_CHANGE, description="CPU threads of each vLLM worker; none: vLLM decides"
    )
    extra_args: list[str] = Field(default_factory=list, description="appended to the server's command line as they are")
    start_timeout_s: float = Field(
        600, gt=0, json_schema_extra=MAY_CHANGE, description="how long a server may take to answer"
    )
    request_timeout_s: float = Field(
        3600, gt=0, json_schema_extra=MAY_CHANGE, description="how long an engine may take over one request"
    )

    def problems(self) -> list[str]:
        """Combinations that cannot work, by vLLM's own conditions, one line each."""
        found = []
        if self.max_num_batched_tokens < self.max_num_seqs:
            found.append(
                f"rollout.max_num_batched_tokens: {self.max_num_batched_tokens} is below rollout.max_num_seqs="
                f"{self.max_num_seqs}; use at least that"
            )
        if self.ep not in (1, self.tp):
            found.append(
                f"rollout.ep: {self.ep} is neither 1 nor rollout.tp={self.tp}, whose workers share out experts; "
                "use one of them"
            )
        found += self._placement_problems()
        if self.port and self.port + self.replicas - 1 > 65535:
            found.append(
                f"rollout.port: {self.port} leaves no ports for rollout.replicas={self.replicas}; use at most "
                f"{65536 - self.replicas}, or 0"
            )
        if self.quantization == "fp8" and self.dtype == "float32":
            found.append(
                "rollout.quantization: fp8, but what is not in FP8 is 16-bit, and rollout.dtype is float32; set that "
                "to bfloat16"
            )
        return found

    def _placement_problems(self) -> list[str]:
        found = []
        if self.placement == "dedicated" and self.driver is None:
            found.append("rollout.driver: missing; give HOST:PORT of rank 0, where dedicated engines join")
        if self.placement == "colocated":
            found += self.idle("rollout", "driver", "rollout.placement=dedicated", self.placement)
        if self.driver is not None:
            host, _, port = self.driver.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 65536:
                found.append(f"rollout.driver: {self.driver!r} is not HOST:PORT; give both, such as node0:29600")
        if self.placement == "dedicated" and self.sleep_while_training:
            found.append(
                "rollout.sleep_while_training: true, but dedicated engines have GPUs of their own; use false, or "
                "rollout.placement=colocated"
            )
        return found
