"""How responses are drawn, in both stages."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_apo.config.base import Section, behind_fingerprint, in_fingerprint


class SamplingConfig(Section):
    temperature: float = Field(
        1.0,
        gt=0,
        json_schema_extra=in_fingerprint("temperature"),
        description="sampling temperature of both stages; log-probs are under it",
    )
    top_p: float = Field(
        1.0,
        ge=1,
        le=1,
        json_schema_extra=in_fingerprint("top_p"),
        description="1 only: truncated sampling changes the policy that is sampled",
    )
    top_k: Literal[-1] = Field(
        -1,
        json_schema_extra=in_fingerprint("top_k"),
        description="-1 only: truncated sampling changes the policy that is sampled",
    )
    max_response_tokens: int = Field(
        1024,
        ge=1,
        json_schema_extra=in_fingerprint("max_response_tokens"),
        description="length cap of a response; part of V*'s provenance",
    )
    stop_token_ids: list[int] | None = Field(
        None,
        json_schema_extra=behind_fingerprint("stop_token_ids"),
        description="ids that end a response; null: the model's EOS and its chat template's end of turn; []: none does",
    )
