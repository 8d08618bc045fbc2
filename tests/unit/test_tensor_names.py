"""Names of tensors: buffers of old files, and many names in one line."""

from __future__ import annotations

import pytest

from megatron_apo.weights.tensor_names import in_lines, is_buffer, pattern_of


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.31.self_attn.rotary_emb.inv_freq", True),
        ("model.layers.0.self_attn.rotary_emb.cos_cached", True),
        ("model.layers.0.self_attn.rotary_emb.sin_cached", True),
        ("model.rotary_emb.inv_freq", True),
        ("vision.rotary_emb.inv_freq", False),  # another architecture's
        ("model.layers.0.self_attn.masked_bias", False),  # GPT-2's; a Llama file has none
        ("model.layers.0.self_attn.rotary_emb.inv_freq.weight", False),
    ],
)
def test_buffers_are_those_of_rotary_embeddings(name: str, expected: bool) -> None:
    assert is_buffer(name) == expected


def test_a_pattern_has_the_least_and_the_greatest_of_its_numbers() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{expert}.w1" for layer in (10, 2) for expert in (3, 0)]
    assert pattern_of(names) == (
        "model.layers.[2-10].mlp.experts.[0-3].w1 (4 tensors, the first model.layers.2.mlp.experts.0.w1)"
    )
    assert pattern_of(names[:1]) == names[0]
    assert pattern_of(["a.1.b.7", "a.2.b.7"]) == "a.[1-2].b.7 (2 tensors, the first a.1.b.7)"


def test_what_is_said_alike_of_one_pattern_is_one_line() -> None:
    experts = [f"model.layers.{layer}.mlp.experts.{expert}" for layer in range(48) for expert in range(128)]
    problems = [(f"{name}.w1", "unknown tensor {}") for name in experts]
    problems += [("lm_head.weight", "unknown tensor {}"), ("model.layers.3.mlp.experts.0.w1", "{} is odd")]
    assert in_lines(problems) == [
        "unknown tensor model.layers.[0-47].mlp.experts.[0-127].w1 "
        "(6144 tensors, the first model.layers.0.mlp.experts.0.w1)",
        "unknown tensor lm_head.weight",
        "model.layers.3.mlp.experts.0.w1 is odd",
    ]


def test_names_that_anybody_made_up_stay_few_short_lines() -> None:
    letters = [chr(ord("a") + index % 26) * (1 + index // 26) for index in range(100)]
    lines = in_lines([(name, "unknown tensor {}") for name in letters])
    assert lines[15:] == ["unknown tensor p", "and 84 more patterns of tensors' names"]
    hostile = ["a\nb", "x" * 10**6, "9" * 5000, "8" * 5000, "", "{}", "\x1b[2J", "\ud800"]
    lines = in_lines([(name, "unknown tensor {}") for name in hostile])
    assert len(lines) == 7 and all(len(line) < 400 and line.isprintable() for line in lines)
