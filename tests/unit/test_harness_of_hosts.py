"""The hosts that tests put jobs on are as apart as machines are, and nothing is left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_apo.runtime import guard
from tests import hosts

NO_NAMESPACES = hosts.why_none()
pytestmark = pytest.mark.skipif(bool(NO_NAMESPACES), reason=NO_NAMESPACES)
ROOT = Path(__file__).parents[2]

# A process that makes hosts on which something runs, says which processes they are, and waits.
MAKER = """
import sys, time
from pathlib import Path
from tests import hosts

with hosts.network(Path(sys.argv[1])) as net:
    net.hosts[0].start("sleep", "1000", log=Path(sys.argv[1]) / "log")
    while not net.pids():
        time.sleep(.01)
    print(net.switch.pid, *(host.pid for host in net.hosts), *net.pids(), flush=True)
    time.sleep(1000)
"""


def test_hosts_share_a_switch_and_a_folder_alone(tmp_path: Path) -> None:
    """Two networks at once, whose hosts have the same names and addresses."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with hosts.network(folders[0]) as first, hosts.network(folders[1], 1, ["other"]) as second:
        own = ["/dev/shm/own", "/tmp/own", "/run/own"]
        for net, folder, names in ((first, folders[0], ["h0", "h1"]), (second, folders[1], ["h0", "other"])):
            assert [host.run("hostname").strip() for host in net.hosts] == names
            for host in net.hosts:
                host.run("sh", "-c", f"for path in met {' '.join(own)}; do hostname >> $path; done", cwd=folder)
            assert (folder / "met").read_text().split() == names
            for host in net.hosts:
                assert host.run("cat", *own) == 3 * f"{host.name}\n"
                assert not any(map(os.path.exists, own))
            net.hosts[0].run("getent", "hosts", names[1])
        assert not (folders[1] / "h0.hosts").samefile(folders[0] / "h0.hosts")
        before = first.bytes_sent(0)
        listener = first.hosts[1].start(
            *(sys.executable, "-c", "import socket; s = socket.create_server(('10.77.0.2', 999)); c, _ = s.accept();"),
            log=folders[0] / "log",
        )
        while not first.hosts[1].pids():
            time.sleep(0.01)
        assert first.hosts[1].pids() == first.pids() and not first.hosts[0].pids() and not second.pids()
        send = "\n".join(
            [
                "import socket, time",
                "while True:",
                "    try:",
                "        with socket.create_connection(('h1', 999)) as link:",
                "            link.sendall(bytes(10000))",
                "        break",
                "    except OSError:",
                "        time.sleep(0.01)",
            ]
        )
        first.hosts[0].run(sys.executable, "-c", send)
        assert first.bytes_sent(0) - before > 10_000
        assert listener.wait(10) == 0
        first.cut(1)
        with pytest.raises(subprocess.CalledProcessError):
            first.hosts[0].run(sys.executable, "-c", "import socket; socket.create_connection(('h1', 999), timeout=1)")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_when_their_maker_ends(how: signal.Signals, tmp_path: Path) -> None:
    maker = subprocess.Popen([sys.executable, "-c", MAKER, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert maker.stdout is not None
        pids = [int(number) for number in maker.stdout.readline().split()]
        assert len(pids) == 4 and hosts.alive(pids) == pids
        maker.send_signal(how)
        maker.wait(10)
        end = time.monotonic() + 10
        while left := hosts.alive(pids):
            assert time.monotonic() < end, f"still there: {left}"
            guard.descendants(os.getpid())  # collects what this process has inherited, if it is one that does
            time.sleep(0.02)
    finally:
        maker.kill()
