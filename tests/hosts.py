"""Hosts of one machine: each has its own network, name, /etc/hosts, /dev/shm, /tmp and /run, as a real one has; they
share a switch, the software that is installed, and of what a run writes one folder.

    with network(folder, count=3) as net:
        process = net.hosts[1].start("hostname", log=folder / "log")

All of it lies below one process, the first of a process namespace: when that ends, however it does, the kernel ends
every other and takes interfaces, addresses and mounts with them. It ends with this process. Nothing has a name outside,
so that several networks can be side by side.

`python hosts.py FOLDER NAME ...` is that first process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

_KINDS = {"net": 0x40000000, "uts": 0x04000000, "mnt": 0x00020000}  # of setns; the mounts last: /proc is among them
_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1


class Process(subprocess.Popen):
    """A process on a host. As one of this machine it is the only child of `nsenter`, by which it got there."""

    @property
    def inner_pid(self) -> int | None:
        """Its number on this machine; None once it has ended."""
        text = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return int(text[0]) if text else None

    def send(self, number: signal.Signals) -> None:
        """A signal to it alone."""
        end = time.monotonic() + 5
        while (pid := self.inner_pid) is None and self.poll() is None:
            assert time.monotonic() < end, "nsenter has started nothing"
            time.sleep(0.01)
        if pid is not None:
            os.kill(pid, number)


@dataclass(frozen=True)
class Host:
    """One of them: `pid` holds it."""

    pid: int
    name: str
    address: str

    def run(self, *command: str, cwd: Path | None = None, given: str = "", **environment: str) -> str:
        """Run a command in it, which is given some text to read; its output."""
        return _run(*self._entering(cwd), *command, given=given, **environment)

    def start(self, *command: str, log: Path, cwd: Path | None = None, **environment: str) -> Process:
        """Start a command in it, which ends with this process, or with the network."""
        with log.open("ab") as output:
            return Process(
                [*self._entering(cwd), *command],
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=partial(_end_with, os.getpid()),
            )

    def pids(self) -> list[int]:
        """Of all processes on it, the one that holds it left out."""
        return [pid for pid in _together(self.pid, "pid", "net") if pid != self.pid]

    def kill(self, *words: str) -> None:
        """SIGKILL of its processes whose command has one of these words; there has to be one."""
        found = []
        for pid in self.pids():
            try:
                line = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            if any(word in line for word in words):
                found.append(pid)
        assert found, words
        for pid in found:
            os.kill(pid, signal.SIGKILL)

    def _entering(self, cwd: Path | None) -> list[str]:
        enter = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--pid"]
        return [*enter, f"--wdns={cwd}"] if cwd else enter

    def enter(self) -> None:
        """Move this process, which has one thread, into it, but for its number."""
        handles = [(os.open(f"/proc/{self.pid}/ns/{kind}", os.O_RDONLY), flag) for kind, flag in _KINDS.items()]
        for handle, flag in handles:
            if _LIBC.setns(handle, flag):
                raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")
            os.close(handle)
        # The host's /proc is of numbers that this process has none of.
        if _LIBC.unshare(_KINDS["mnt"]) or _LIBC.mount(b"proc", b"/proc", b"proc", 0, None):
            raise OSError(ctypes.get_errno(), f"/proc: {os.strerror(ctypes.get_errno())}")


@dataclass(frozen=True)
class Network:
    hosts: list[Host]
    switch: Host

    def cut(self, index: int) -> None:
        """Unplug a host without a word: its interface stays up, and no one is told."""
        self.switch.run("ip", "link", "set", f"port{index}", "down")

    def mend(self, index: int) -> None:
        """Plug it in again."""
        self.switch.run("ip", "link", "set", f"port{index}", "up")

    def bytes_sent(self, index: int) -> int:
        """By a host's interface, since it is there; what stays on the host is not among them."""
        lines = self.hosts[index].run("cat", "/proc/self/net/dev").splitlines()
        (numbers,) = [line.partition(":")[2].split() for line in lines if line.strip().startswith("eth0:")]
        return int(numbers[8])

    def pids(self) -> list[int]:
        """Of all processes on the hosts, those that hold them left out."""
        holders = {self.switch.pid, *(host.pid for host in self.hosts)}
        return [pid for pid in _together(self.switch.pid, "pid") if pid not in holders]


def why_none() -> str:
    """Why there can be no such hosts here; empty if there can."""
    try:
        _run("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "ip", "link", "add", "type", "bridge")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces cannot be made here ({error}); it takes root and iproute2"
    return ""


@contextmanager
def network(folder: Path, count: int = 2, others: Sequence[str] = ()) -> Iterator[Network]:
    """`count` hosts h0, h1 .., then others by their names; 10.77.0.1 and on. A name resolves to 127.0.1.1 at home, as
    Debian has it. They share `folder`, where it is."""
    names = [*(f"h{index}" for index in range(count)), *others]
    flags = ["--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
    first = subprocess.Popen(
        ["unshare", *flags, sys.executable, "-I", __file__, str(folder), *names],
        stdout=subprocess.PIPE,
        preexec_fn=partial(_end_with, os.getpid()),
    )
    try:
        assert first.stdout is not None
        numbers = first.stdout.readline().split()
        assert len(numbers) == len(names), "the hosts were not made"
        (root,) = _children(first.pid)
        outside = {_number_inside(pid): pid for pid in _together(root, "pid")}
        hosts = [
            Host(outside[int(number)], name, f"10.77.0.{index + 1}")
            for index, (number, name) in enumerate(zip(numbers, names, strict=True))
        ]
        yield Network(hosts, Host(root, "switch", ""))
    finally:
        first.kill()
        first.wait()


# --- the first process


def _be_first(folder: Path, names: list[str]) -> None:
    _run("ip", "link", "add", "bridge", "type", "bridge")
    _run("ip", "link", "set", "bridge", "up")
    holders = [subprocess.Popen(["unshare", "--net", "--uts", "--mount", "sleep", "infinity"]) for _ in names]
    for index, holder in enumerate(holders):
        while Path(f"/proc/{holder.pid}/comm").read_text() != "sleep\n":
            assert holder.poll() is None, "unshare failed"
            time.sleep(0.002)
        _run("ip", "link", "add", f"port{index}", "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid))
        _run("ip", "link", "set", f"port{index}", "master", "bridge", "up")
        lines = ["127.0.0.1 localhost", f"127.0.1.1 {names[index]}"]
        lines += [f"10.77.0.{other + 1} {name}" for other, name in enumerate(names) if other != index]
        table = folder / f"{names[index]}.hosts"
        table.write_text("\n".join(lines) + "\n")
        run = partial(_run, "nsenter", f"--target={holder.pid}", "--net", "--uts", "--mount")
        run("mount", "--bind", str(table), "/etc/hosts")
        run("mount", "--bind", str(folder), "/mnt")
        for own in ("/dev/shm", "/tmp", "/run"):
            run("mount", "-t", "tmpfs", "tmpfs", own)
        run("mkdir", "-p", str(folder))
        run("mount", "--move", "/mnt", str(folder))
        run("hostname", names[index])
        run("ip", "address", "add", f"10.77.0.{index + 1}/24", "dev", "eth0")
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "set", "eth0", "up")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans of the hosts are this process's, and nobody asks for them
    print(*(holder.pid for holder in holders), flush=True)
    signal.pause()


def _end_with(parent: int) -> None:
    """In a child: be killed when `parent` ends, which may have been before this."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def _together(pid: int, *kinds: str) -> list[int]:
    """Processes of this machine whose namespaces of these kinds are those of `pid`, which is one of them."""

    def namespaces(entry: Path) -> list[int]:
        return [os.stat(entry / "ns" / kind).st_ino for kind in kinds]

    wanted, found = namespaces(Path(f"/proc/{pid}")), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if namespaces(entry) == wanted and _is_alive(int(entry.name)):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def _number_inside(pid: int) -> int:
    """Of a process, in its own namespace."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("NSpid:")]
    return int(line.split()[-1])


def _run(*command: str, given: str = "", **environment: str) -> str:
    everything = os.environ | environment
    return subprocess.run(command, check=True, capture_output=True, text=True, input=given, env=everything).stdout


def alive(pids: Sequence[int]) -> list[int]:
    """Those that have not ended, whoever has still to be told of it."""
    return [pid for pid in pids if _is_alive(pid)]


def _is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


if __name__ == "__main__":
    _be_first(Path(sys.argv[1]), sys.argv[2:])
