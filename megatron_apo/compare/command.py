"""`megatron-apo compare`: what is refused before work, then the runs, and the results after each of them."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from megatron_apo import preflight
from megatron_apo.compare import text
from megatron_apo.compare.campaign import Campaign
from megatron_apo.compare.page import write_page
from megatron_apo.compare.plan import LOCK, Plan
from megatron_apo.compare.results import results, write_results
from megatron_apo.config import RecipeError


def run(plan: Plan, out: Path) -> None:
    """Raises `RecipeError` with every problem of every method, before any work."""
    plan.check(out)
    if problems := plan.problems(out, lambda one: preflight.problems(one, "train")):
        raise RecipeError(problems)
    with alone(out):
        plan.check(out)  # of another command that has begun meanwhile
        plan.keep(out)
        _run(plan, out)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """No other command works on this comparison meanwhile. A file system that knows no locks lets them."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / LOCK, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(
                [f"--out: {out} is another command's at this moment; wait for it, or give another folder"]
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield


def _run(plan: Plan, out: Path) -> None:
    console = Console()
    campaign = Campaign(plan, out, lambda line: console.print(line, soft_wrap=True, highlight=False), _write)
    campaign.run()
    page = _write(campaign)
    for setting, lines in results(campaign).items():
        for table in text.tables(plan, setting, lines):
            console.print(table)
        console.print("\n".join(text.notes(plan, setting, lines)), highlight=False)
    console.print(f"page: {page}", soft_wrap=True)


def _write(campaign: Campaign) -> Path:
    found = results(campaign)
    write_results(campaign, found)
    return write_page(campaign, found)
