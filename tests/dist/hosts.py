"""Hosts of one machine: each has its own network, name and /etc/hosts, as a real one has, and they share a switch.

A host is what a process holds (namespaces), and ends with it; that process ends with this one, however this one ends.
So nothing has a name that another run of the tests could take, and nothing is left.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_apo.runtime import guard

_KINDS = {"net": 0x40000000, "uts": 0x04000000, "mnt": 0x00020000}  # of setns; the mounts last: /proc is among them


@dataclass(frozen=True)
class Host:
    """One of them: `pid` holds it."""

    pid: int
    name: str
    address: str

    def run(self, *command: str) -> None:
        """Run a command in it."""
        _run("nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", *command)

    def enter(self) -> None:
        """Move this process, which has one thread, into it."""
        handles = [(os.open(f"/proc/{self.pid}/ns/{kind}", os.O_RDONLY), flag) for kind, flag in _KINDS.items()]
        for handle, flag in handles:
            if guard.LIBC.setns(handle, flag):
                raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")
            os.close(handle)


@dataclass(frozen=True)
class Network:
    hosts: list[Host]
    switch: Host

    def cut(self, index: int) -> None:
        """Unplug a host without a word: its interface stays up, and no one is told."""
        self.switch.run("ip", "link", "set", f"port{index}", "down")


def why_none() -> str:
    """Why there can be no such hosts here; empty if there can."""
    try:
        _run("unshare", "--net", "--uts", "--mount", "ip", "link", "add", "type", "bridge")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces cannot be made here ({error}); it takes root and iproute2"
    return ""


@contextmanager
def network(folder: Path, count: int = 2) -> Iterator[Network]:
    """`count` hosts h0, h1 .., 10.77.0.1 and on, whose names resolve to 127.0.1.1 at home, as Debian has it."""
    holders: list[subprocess.Popen[bytes]] = []

    def hold(name: str, address: str) -> Host:
        command = ["unshare", "--net", "--uts", "--mount", "sleep", "infinity"]
        holders.append(subprocess.Popen(command, preexec_fn=partial(_end_with, os.getpid())))
        host = Host(holders[-1].pid, name, address)
        while Path(f"/proc/{host.pid}/comm").read_text() != "sleep\n":
            assert holders[-1].poll() is None, "unshare failed"
        return host

    try:
        switch = hold("switch", "")
        switch.run("ip", "link", "add", "bridge", "type", "bridge")
        switch.run("ip", "link", "set", "bridge", "up")
        hosts = [hold(f"h{index}", f"10.77.0.{index + 1}") for index in range(count)]
        for index, host in enumerate(hosts):
            peer = ["type", "veth", "peer", "name", "eth0", "netns", str(host.pid)]
            switch.run("ip", "link", "add", f"port{index}", *peer)
            switch.run("ip", "link", "set", f"port{index}", "master", "bridge", "up")
            names = folder / f"{host.name}.hosts"
            lines = ["127.0.0.1 localhost", f"127.0.1.1 {host.name}"]
            lines += [f"{other.address} {other.name}" for other in hosts if other is not host]
            names.write_text("\n".join(lines) + "\n")
            host.run("mount", "--bind", str(names), "/etc/hosts")
            host.run("hostname", host.name)
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "lo", "up")
            host.run("ip", "link", "set", "eth0", "up")
        yield Network(hosts, switch)
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def _end_with(parent: int) -> None:
    """In a child: be killed when `parent` ends, which may have been before this."""
    guard.LIBC.prctl(guard.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
