"""One page, without outside assets, of what a V* store holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_apo.telemetry import page, plots
from megatron_apo.telemetry.units import number
from megatron_apo.telemetry.vstar_text import NOT_BINARY
from megatron_apo.values.summary import EstimatorsAt, Summary, Values


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
    k, best = next((k, at) for k, at in found.pass_at_k.items() if k == found.first_round)
    return page.cards(
        [
            page.card("prompts", number(found.prompts), f"{found.samples} samples of each"),
            page.card("mean reward", _with_error(found.reward.mean, found.reward.stderr), _of_first_round(found)),
            page.card(f"Pass@{k}", _with_error(best.mean, best.stderr), "unbiased estimate"),
            page.card("cut at the length cap", f"{found.responses.truncated:.1%}", "of responses"),
            page.card("hours", f"{sum(found.hours.values()):.2f}", ", ".join(found.hours)),
        ]
    )


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} <small>± {error:.3f}</small>"


def _of_first_round(found: Summary) -> str:
    return f"first {found.first_round} samples of each" if found.fingerprint["adaptive"] else "over prompts"


def _values(found: Summary) -> str:
    rows = [(name, number(left.prompts), f"{left.share:.1%}") for name, left in found.left_out.items()]
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
    all_prompts, some_prompts = f"all {number(found.prompts)} prompts", "prompts with k samples"
    lines: dict[str, plots.Points] = {all_prompts: ([], [], []), some_prompts: ([], [], [])}
    for k, at in found.pass_at_k.items():
        of = lines[all_prompts if k <= found.first_round else some_prompts]
        for values, value in zip(of, (k, at.mean, at.stderr or 0.0), strict=True):
            values.append(value)  # type: ignore[attr-defined]
    lines = {name: line for name, line in lines.items() if line[0]}
    caption = "Unbiased estimate; the band is one standard error over prompts."
    if some_prompts in lines:
        fewest = found.pass_at_k[max(found.pass_at_k)].num_prompts
        caption += f" Beyond {found.first_round}, of the uncertain prompts alone ({number(fewest)} at the end)."
    title = "share of right samples of a prompt"
    chart = plots.histogram(title, found.right.at, found.right.counts, None, "share right", "prompts")
    return page.figure(plots.band_chart("Pass@k", lines, "k"), caption, title="Pass@k") + page.figure(
        chart, "" if found.binary else NOT_BINARY, title=title
    )


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
        *((f"workers' hours, {device or 'unknown'}", f"{hours:.2f}") for device, hours in found.hours.items()),
    ]
    return lengths_figure(found, "All stage-1 samples.") + page.table("Responses", ("what", "value"), rows)


def _provenance(found: Summary) -> str:
    fields = [(name, str(value)) for name, value in found.fingerprint.items()]
    return page.table("Fingerprint", ("field", "value"), fields, wide=True)
