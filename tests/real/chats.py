"""Real text in the model's own chat template: a few short exchanges, and one of about 1,400 tokens."""

from __future__ import annotations

from pathlib import Path

from megatron_apo.model.tokenizer import load_tokenizer

LICENSE = (Path(__file__).parents[2] / "LICENSE").read_text()
CHATS = [
    ("What is 3 + 4?", "3 + 4 = 7"),
    ("Who wrote Hamlet?", "Hamlet was written by William Shakespeare, around the year 1600."),
    ("Name three primary colours.", "The three primary colours are red, blue and yellow."),
    (
        "A shop sells pens at 2 dollars each. How much do 6 pens cost?",
        "Each pen costs 2 dollars, and there are 6 pens.\n\n2 × 6 = 12\n\nThe answer is $\\boxed{12}$.",
    ),
    ("Traduisez en français : good morning!", "Bonjour ! 😊"),
    (
        "Write a function that adds two numbers in Python.",
        "```python\ndef add(a: int, b: int) -> int:\n    return a + b\n```",
    ),
    ("Thank you.", "You're welcome."),
    (f"How does this license go on?\n\n{LICENSE[:4000]}", LICENSE[4000:7000]),
]


def tokenized(model: Path) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts, responses) by the tokenizer and the template of `model`; each response ends its turn."""
    tokenizer = load_tokenizer(model, "model")
    prompts, responses = [], []
    for asked, answered in CHATS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
        )
        prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        responses.append(tokenizer(answered + tokenizer.eos_token, add_special_tokens=False)["input_ids"])
    return prompts, responses
