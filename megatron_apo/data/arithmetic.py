"""The arithmetic-with-thinking task: data, tokenizer and an untrained model small enough to learn on a laptop.

    47+8+5=    ->    <think>47+8=55;55+5=60</think>60

The demonstrations for the warm start come from a demonstrator who often stops thinking too early:

    47+8+5=    ->    <think>47+8=55</think>55

A model that has learnt to imitate this is wrong as often as the demonstrator, on every seed and however long it was
trained, and has something to learn from a reward: to think to the end.

Nothing is downloaded; everything follows from a seed. The files are read like any user's (see `prompts.py`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

STOPS_EARLY = 0.4  # share of the demonstrations
PROBLEMS = [(a, b, c) for a in range(10, 100) for b in range(1, 10) for c in range(b, 10)]
CHARACTERS = "0123456789+=;"
THINK_TAGS = ("<think>", "</think>")  # ordinary tokens: text keeps them when special tokens are dropped
EOS, PAD, UNKNOWN = "<eos>", "<pad>", "<unk>"


def write_task(folder: Path | str, seed: int, num_train: int, num_eval: int, num_sft: int) -> dict[str, Path]:
    """Write train.jsonl, eval.jsonl (prompt, answer) and sft.jsonl (prompt, response, answer); paths by stem.

    No problem is in two files, not even with its operands in another order. Raises `ValueError` if there are too few.
    """
    total = num_train + num_eval + num_sft
    if total > len(PROBLEMS):
        raise ValueError(f"the arithmetic task has {len(PROBLEMS)} problems, {total} were asked for; ask for fewer")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    problems = _problems(random.Random(seed))
    demonstrator = random.Random(f"{seed} demonstrations")
    paths = {}
    for name, size in (("train", num_train), ("eval", num_eval), ("sft", num_sft)):
        paths[name] = folder / f"{name}.jsonl"
        with open(paths[name], "w") as file:
            for _ in range(size):
                operands = next(problems)
                row = {"prompt": "{}+{}+{}=".format(*operands), "answer": str(sum(operands))}
                if name == "sft":
                    row["response"] = _demonstration(operands, stops_early=demonstrator.random() < STOPS_EARLY)
                file.write(json.dumps(row) + "\n")
    return paths


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of the task, plus the think tags; `<eos>`, `<pad>` and `<unk>` are special."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([PAD, EOS, UNKNOWN, *THINK_TAGS, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in THINK_TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def write_model(folder: Path | str, seed: int, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Write an untrained Qwen3 of 790,144 parameters (fp32, tied embeddings) and its tokenizer, in Hugging Face form.

    Four heads in two key-value groups, four layers: it divides into two tensor-parallel ranks and up to four stages.
    """
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    if bars:
        logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)
    return Path(folder)


def _problems(rng: random.Random) -> Iterator[tuple[int, int, int]]:
    """All problems in random order, each with its single digits in random order."""
    for a, b, c in rng.sample(PROBLEMS, len(PROBLEMS)):
        yield (a, b, c) if rng.random() < 0.5 else (a, c, b)


def _demonstration(operands: tuple[int, int, int], stops_early: bool) -> str:
    a, b, c = operands
    thoughts, answer = f"{a}+{b}={a + b}", a + b
    if not stops_early:
        thoughts, answer = f"{thoughts};{answer}+{c}={answer + c}", answer + c
    return f"<think>{thoughts}</think>{answer}"
