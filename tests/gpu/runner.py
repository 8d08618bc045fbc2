"""Runs GPU checks one after the other: bash tests/gpu/run.sh | first.sh [--tiny] [--seconds S] [FOLDER]

What a check prints goes to the terminal and, as it comes, to FOLDER/<check>.txt; FOLDER/RESULTS.md has a row for each
check that has ended, to be copied to tests/gpu/RESULTS.md. So a kill at any moment leaves what was measured until then.
A check has a limit of seconds, at which it is cut. All of them together have --seconds, if any (first.sh: 540): then a
check may take up to twice its limit where those before it left that over, and is not run where less than a quarter of
its limit is left.

Ends with 1 where a check failed or was cut, 77 where none could run, 130 after Ctrl-C, 143 after SIGTERM (129: SIGHUP).
A check that could not run (exit code 77) says why and is no failure.

Standard library only: it runs, and names what is missing, whatever is installed.
"""

from __future__ import annotations

import argparse
import io
import os
import secrets
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
# Ends the whole tree of what it starts, also when this process is killed, and removes its folders.
GUARD = ROOT / "megatron_apo/runtime/guard.py"
CANNOT_RUN = 77  # exit code, as Automake's tests say it
FIRST_S = 540.0
_END_S = 10.0  # for a check that is cut to be gone
_LEAST = 0.25  # of its limit: with less a check is not begun
_START_S = 90.0  # for torch to be imported and to say which GPU there is
_LOOK_S = 0.2  # for a signal


@dataclass(frozen=True)
class Check:
    """`words`: what Python is given."""

    name: str
    words: tuple[str, ...]
    limit_s: float


def check(words: str, limit_s: float, name: str | None = None) -> Check:
    return Check(name or words.split()[0], ("-m", "tests.gpu", *words.split()), limit_s)


ALL = [
    check("parity", 600),
    check("fp8_speed", 600),
    check("placement", 600),
    check("step --shape 1.5B", 600, "step-1.5B"),
    check("step --shape 7B", 600, "step-7B"),
    check("logprob_head", 600),
    check("engine", 600),
    check("engine --transport ipc", 600, "engine-ipc"),
    check("engine --transport collective", 600, "engine-collective"),
]
# What matters most comes first. The limits are 510 s in all: the rest is for the start and for what is cut.
FIRST = [
    check("parity --quick", 120),
    check("logprob_head --quick", 50),
    check("placement --quick", 70),
    check("step --shape 1.5B --quick", 90, "step-1.5B"),
    check("fp8_speed --quick", 80),
    check("engine --quick", 100),
]


@dataclass(frozen=True)
class Outcome:
    """How a check ended. `state`: "passed", "failed" or "not run"; `said`: its figures, or why there are none."""

    state: str
    said: str
    seconds: float = 0.0


class EndSignal:
    """The first signal that asks to end: `name`, None before. It is looked at where a check is waited for."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.code = 0  # of this process then
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name, self.code = signal.Signals(number).name, 128 + number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", action="store_true", help="the checks of first.sh")
    parser.add_argument("--tiny", action="store_true", help="small enough for a CPU; the figures mean nothing")
    parser.add_argument("--seconds", type=float, help="for all of them together; default: no limit, --first: 540")
    parser.add_argument("folder", nargs="?", type=Path, help="default: gpu-checks, --first: gpu-first")
    args = parser.parse_args()
    folder = (args.folder or Path("gpu-first" if args.first else "gpu-checks")).absolute()
    seconds = args.seconds or (FIRST_S if args.first else None)
    sys.exit(run(FIRST if args.first else ALL, folder, seconds, args.tiny))


def run(checks: Sequence[Check], folder: Path, seconds: float | None = None, tiny: bool = False) -> int:
    """Run the checks; returns the exit code. `seconds`: for all of them together."""
    deadline = time.monotonic() + seconds if seconds else None
    end = EndSignal()
    device = machine(tiny)
    if device is None:
        return end.code or CANNOT_RUN
    folder.mkdir(parents=True, exist_ok=True)
    tell(f"{device}; tables and RESULTS.md in {folder}\n")
    results = (folder / "RESULTS.md").open("w", buffering=1)
    results.write("| check | command | device, versions, date | figures |\n|---|---|---|---|\n")
    outcomes: dict[str, Outcome] = {}
    for index, each in enumerate(checks):
        words = (*each.words, *(["--tiny"] if tiny else []))
        left_s = None if deadline is None else deadline - _END_S - time.monotonic()
        allowed_s = seconds_for(checks, index, left_s)
        if end.name:
            outcome = Outcome("not run", f"ended by {end.name}")
        elif allowed_s is None:
            outcome = Outcome("not run", "no time left")
        else:
            tell(f"== {each.name}: python {shlex.join(words)}, for at most {allowed_s:.0f} s\n")
            outcome = run_one(each.name, words, folder, allowed_s, end)
        outcomes[each.name] = outcome
        tell(f"== {each.name}: {_line(outcome)}\n")
        results.write(row(each.name, words, device, outcome))
    states = [outcome.state for outcome in outcomes.values()]
    tell("\n" + "".join(f"{name:<16}{_line(outcome)}\n" for name, outcome in outcomes.items()))
    if end.name:
        return end.code
    return 1 if "failed" in states else 0 if "passed" in states else CANNOT_RUN


def seconds_for(checks: Sequence[Check], index: int, left_s: float | None) -> float | None:
    """What a check may take when `left_s` are left for all (None: no limit). That is its limit; more, up to twice that,
    where those after it do not need it; less at the end. None where it is too little to begin."""
    limit_s = checks[index].limit_s
    if left_s is None:
        return limit_s
    spare_s = left_s - sum(each.limit_s for each in checks[index + 1 :])
    allowed_s = min(left_s, max(limit_s, min(spare_s, 2 * limit_s)))
    return allowed_s if allowed_s >= _LEAST * limit_s else None


def machine(tiny: bool) -> str | None:
    """Device, versions and date, or None after a line that says what is missing."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu", "report", *(["--tiny"] if tiny else [])]
    try:
        found = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=_START_S
        )
    except subprocess.TimeoutExpired:
        print(f"tests/gpu: torch does not say within {_START_S:.0f} s whether there is a GPU", file=sys.stderr)
        return None
    if found.returncode == 0:
        return found.stdout.strip().splitlines()[-1]
    print((found.stderr.strip().splitlines() or [f"tests/gpu: status {found.returncode}"])[-1], file=sys.stderr)
    return None


def run_one(name: str, words: Sequence[str], folder: Path, limit_s: float, end: EndSignal) -> Outcome:
    """Run a check, below a guard, until it ends, `limit_s` are over or a signal asks to end."""
    start = time.monotonic()
    path = folder / f"{name}.txt"
    # Short, for the sockets in it.
    temporary = Path(tempfile.gettempdir()) / f"gpu-{secrets.token_hex(4)}"
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "TMPDIR": str(temporary), "GPU_CHECKS_FOLDER": str(folder)}
    # What one check has compiled is there for the next.
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}")
    watch = [sys.executable, "-I", str(GUARD), f"--parent={os.getpid()}", f"--folder={temporary}", "--"]
    with path.open("wb", buffering=0) as log:
        process = subprocess.Popen(
            [*watch, sys.executable, "-W", "ignore", *words],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for this process, which then ends the check
        )
        whole = _copy(process, log, start + limit_s, end)
        if not whole:
            process.terminate()
            _copy(process, log, time.monotonic() + _END_S)
        with suppress(subprocess.TimeoutExpired):
            process.wait(1)
        if process.poll() is None:
            tell("== processes of this check cannot be ended; going on\n")
            process.kill()
    seconds = time.monotonic() - start
    cut = None if whole else f"ended by {end.name}" if end.name else "cut"
    return _outcome(path, process.returncode, cut and f"{cut} after {seconds:.0f} s", seconds)


def _copy(process: subprocess.Popen[bytes], log: io.RawIOBase, until: float, end: EndSignal | None = None) -> bool:
    """Copy what it prints to the terminal and `log` until it has ended; False where time is up or `end` asks first."""
    assert process.stdout
    while (left_s := until - time.monotonic()) > 0 and not (end and end.name):
        if select.select([process.stdout], [], [], min(left_s, _LOOK_S))[0]:
            if not (data := os.read(process.stdout.fileno(), 65536)):
                return True
            log.write(data)
            tell(data)
    return False


def _outcome(path: Path, code: int | None, cut: str | None, seconds: float) -> Outcome:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    figures = [line.removeprefix("figures: ") for line in lines if line.startswith("figures: ")]
    last = lines[-1].removeprefix("tests/gpu: ").removeprefix("not run: ") if lines else "it said nothing"
    if cut:
        return Outcome("failed", "; ".join([f"{cut}, what it had measured is in {path.name}", *figures]), seconds)
    if code == CANNOT_RUN:
        return Outcome("not run", last, seconds)
    if code:
        return Outcome("failed", "; ".join([last, *figures]), seconds)
    return Outcome("passed", "; ".join(figures) or "passed", seconds)


def _line(outcome: Outcome) -> str:
    if outcome.state == "passed":
        return f"passed in {outcome.seconds:.0f} s"
    return f"{outcome.state}: {outcome.said}"


def row(name: str, words: Sequence[str], device: str, outcome: Outcome) -> str:
    """A row of RESULTS.md."""
    said = outcome.said if outcome.state == "passed" else f"{outcome.state}: {outcome.said}"
    cells = [name, f"`python {shlex.join(words)}`", device, said]
    return f"| {' | '.join(' '.join(cell.replace('|', chr(92) + '|').split()) for cell in cells)} |\n"


def tell(what: bytes | str) -> None:
    """Print at once. A terminal that is gone keeps nothing from being measured."""
    try:
        sys.stdout.buffer.write(what if isinstance(what, bytes) else what.encode())
        sys.stdout.buffer.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


if __name__ == "__main__":
    main()
