"""Of a run's report: held-out prompts with the responses before and after training, and what their grader saw."""

from __future__ import annotations

from html import escape
from pathlib import Path

from megatron_apo.telemetry import page
from megatron_apo.telemetry.samples import EvaluatedPrompt, read_samples

_SHOWN = 3  # prompts of each kind
_LONGEST = 1200  # characters of a text


def samples_section(run_dir: Path) -> str:
    """HTML: the prompts that gained most and least between the first evaluation and the last."""
    found = read_samples(run_dir)
    if not found:
        return page.missing("samples: no evaluation in this run's folder yet")
    first, last = min(found), max(found)
    before = {one.prompt_id: one for one in found[first]}
    pairs = [(before[one.prompt_id], one) for one in found[last] if one.prompt_id in before]
    if first == last:
        pairs.sort(key=lambda pair: -pair[1].mean)
    else:
        pairs.sort(key=lambda pair: pair[0].mean - pair[1].mean)
    best, worst = pairs[:_SHOWN], pairs[_SHOWN:][-_SHOWN:]
    names = ("scored most", "scored least") if first == last else ("gained most", "gained least")
    return "".join(
        _group(f"Prompts that {name}", shown, first, last) for name, shown in zip(names, (best, worst), strict=True)
    )


def _group(title: str, pairs: list[tuple[EvaluatedPrompt, EvaluatedPrompt]], first: int, last: int) -> str:
    if not pairs:
        return ""
    body = ""
    for before, after in pairs:
        body += f"<dt>{_text(after.prompt)}</dt><dd>reference {_code(after.reference or after.answer)}</dd>"
        body += _response(f"step {first}", before)
        body += _response(f"step {last}", after) if last != first else ""
    return f'<div class="samples wide"><h3>{escape(title)}</h3><dl>{body}</dl></div>'


def _response(when: str, one: EvaluatedPrompt) -> str:
    cut = ", cut at the length cap" if one.finish_reason == "length" else ""
    seen = f"the grader saw {_code(one.seen)}" if one.seen else "the grader saw no answer"
    why = f" ({escape(one.reason)})" if one.reason else ""
    score = f"reward {one.reward:g}"
    graded = f"{score}{why}" if one.seen is None else f"{seen}{why}: {score}"
    return (
        f"<dd><b>{when}, greedy{cut}</b>: {_text(one.response)}"
        f"<small>{graded}; mean of the samples {one.mean:.2f}</small></dd>"
    )


def _text(text: str) -> str:
    shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} [...]"
    return f"<pre>{escape(shown)}</pre>"


def _code(text: str) -> str:
    return f"<code>{escape(text[:_LONGEST])}</code>"
