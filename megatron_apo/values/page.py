"""One page, without outside assets, of what a V* store holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_apo.telemetry import page, plots
from megatron_apo.telemetry.units import number
from megatron_apo.values.summary import EstimatorsAt, Summary, Values
from megatron_apo.values.text import NOT_BINARY


def write_page(path: Path, found: Summary, estimators: Sequence[EstimatorsAt]) -> None:
    """Write the page to the file `path`."""
    name = Path(found.folder).resolve().name
    subtitle = f"{found.fingerprint['reward_name']} · temperature {found.fingerprint['temperature']:g} · {found.folder}"
    sections = [
        _headline(found),
        page.section("V* of the prompts", _values(found)),
        page.section("Right samples", _right(found)),
        page.section("Estimators", _estimators(estimators)),
        page.section("Responses of the reference", _responses(found)),
        page.section("Where the samples come from", _provenance(found)),
    ]
    path.write_text(page.document(name, "V* store", subtitle, sections))


def values_figure(found: Summary, values: Values, caption: str) -> str:
    """The histogram of V* at one b1."""
    title = f"V* at b1 = {values.beta1:g}"
    bars = values.bars
    chart = plots.histogram(title, bars.at, bars.counts, values.mean, f"V* ({found.estimator})", "prompts")
    return page.figure(chart, caption, title=title)


def lengths_figure(found: Summary, caption: str) -> str:
    """The histogram of response lengths."""
    title, bars = "response lengths of the reference", found.responses.bars
    chart = plots.histogram(title, bars.at, bars.counts, found.responses.mean_tokens, "tokens", "responses")
    return page.figure(chart, caption, title=title)


def _headline(found: Summary) -> str:
    first, reward = found.first_round, found.reward
    best = found.pass_at_k[first]
    return page.cards(
        [
            page.card("prompts", number(found.prompts), f"{found.samples} samples of each"),
            page.card("mean reward", page.with_error(reward.mean, reward.stderr), f"first {first} samples of each"),
            page.card(f"Pass@{first}", page.with_error(best.mean, best.stderr), "unbiased estimate"),
            page.card("cut at the length cap", f"{found.responses.truncated:.1%}", "of responses"),
            *(page.card("hours", f"{hours:.2f}", device) for device, hours in found.hours.items()),
        ]
    )


def _values(found: Summary) -> str:
    rows = [(name, number(left.prompts), f"{left.share:.1%}") for name, left in found.left_out.items()]
    if found.without_value:
        rows.append(("none: without V*", number(found.without_value), f"{found.without_value / found.prompts:.1%}"))
    filters = page.table("What vstar.filter would leave out", ("filter", "prompts", "share"), rows)
    figures = [
        values_figure(
            found,
            values,
            f"{values.p10:.3f}, {values.p50:.3f} and {values.p90:.3f} at 10, 50 and 90% of the prompts; "
            f"{values.smallest:.3f} to {values.largest:.3f}.",
        )
        for values in found.values
    ]
    return "".join(figures) + filters


def _right(found: Summary) -> str:
    first, last = found.first_round, max(found.pass_at_k)
    lines = {f"all {number(found.prompts)} prompts": _pass_at(found, range(1, first + 1))}
    caption = f"Unbiased up to k = {first}; the band is one standard error over prompts."
    if last > first:
        lines["prompts with k samples"] = _pass_at(found, range(first + 1, last + 1))
        num = number(found.pass_at_k[last].num_prompts)
        caption += f" Beyond, of uncertain prompts alone ({num} at the end), and biased by the stopping rule."
    title = "share of right samples of a prompt"
    chart = plots.histogram(title, found.right.at, found.right.counts, None, "share right", "prompts")
    return page.figure(plots.band_chart("Pass@k", lines, "k"), caption, title="Pass@k") + page.figure(
        chart, "" if found.binary else NOT_BINARY, title=title
    )


def _pass_at(found: Summary, ks: Sequence[int]) -> plots.Points:
    at = [found.pass_at_k[k] for k in ks]
    return ks, [mean.mean for mean in at], [mean.stderr or 0.0 for mean in at]


def _estimators(estimators: Sequence[EstimatorsAt]) -> str:
    blocks = ""
    for at in estimators:
        title = f"V* by mean reward of a prompt, b1 = {at.beta1:g}"
        lines = {name: (at.mean_reward, values) for name, values in at.curves.items()}
        blocks += page.figure(plots.line_chart(title, lines, x_label="mean reward"), "", title=title)
    head = ["estimator", *(f"b1 = {at.beta1:g}" for at in estimators)]
    rows = [[name, *(f"{at.means[name]:.4f}" for at in estimators)] for name in estimators[0].means]
    return blocks + page.table("Mean V* of all prompts", head, rows)


def _responses(found: Summary) -> str:
    responses = found.responses
    rows = [
        ("responses", number(responses.count)),
        ("tokens, mean", f"{responses.mean_tokens:.1f}"),
        ("tokens at 50, 90 and 99%", f"{responses.p50}, {responses.p90}, {responses.p99}"),
        ("tokens, longest", str(responses.longest)),
        ("cut at the length cap", f"{responses.truncated:.2%}"),
        ("thinking never closed", number(responses.num_unfinished)),
        ("graders' failures", number(responses.num_failures)),
        *((f"hours, {device}", f"{hours:.2f}") for device, hours in found.hours.items()),
    ]
    return lengths_figure(found, "All stage-1 samples.") + page.table("Responses", ("what", "value"), rows)


def _provenance(found: Summary) -> str:
    fields = [(name, str(value)) for name, value in found.fingerprint.items()]
    return page.table("Fingerprint", ("field", "value"), fields, wide=True)
