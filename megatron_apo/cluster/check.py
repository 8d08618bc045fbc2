"""Every node of a job looked at before anything is spent, all at once.

Each node's process listens, tells in the run's folder where, and asks all the others for the time; then all of them
sum a number by gloo, or NCCL on GPUs, if they are alike and reach each other; where that fails neighbours try it in
pairs. What it saw it prints, one line of JSON, so that a node that does not share the folder is heard as well. `table`
and `bad_nodes` are the job's: what differs from most nodes, or is out of reach, is named.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from megatron_apo.doctor import gpu_findings, package_findings
from megatron_apo.runtime.files import write_whole
from megatron_apo.runtime.hosts import is_loopback, route
from megatron_apo.runtime.ports import free_port
from megatron_apo.telemetry.units import data_size

CLOCK_S = 5.0  # clocks may differ by so much
_MEMORY = 0.9  # of what most nodes have, that each must have
_REACH_S = 5.0  # for one node to answer another
_SHOWN_S = 90.0  # for a file to be seen by all: network file systems remember that it was not there
_SUM_S, _PAIR_S = 90.0, 20.0  # for all, and for two, to have summed
_SHARED, _NODES = "token", "nodes.json"
_PARTS = ("versions", "gpus", "python")  # in which all nodes must be alike


@dataclass(frozen=True)
class Found:
    """What a node tells of itself. memory_bytes: of the host; offset_s: of its clock against the first node's;
    unreachable: nodes that did not answer it; problems: one line each."""

    node: str
    address: str = ""
    ports: list[int] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    python: str = ""
    gpus: list[str] = field(default_factory=list)
    cpus: int = 0
    memory_bytes: int = 0
    offset_s: float = 0.0
    unreachable: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def prepare(folder: Path, token: str, nodes: Sequence[str], must_see: Sequence[str] = ()) -> None:
    """The job's part: what a node that shares the folder finds there. It is a new one each time. must_see: paths that
    are there for this process, and have to be on each node."""
    folder.mkdir(parents=True)
    (folder / _NODES).write_text(json.dumps({"nodes": list(nodes), "must_see": list(must_see)}))
    (folder / _SHARED).write_text(token)


def look(node: str, folder: Path, token: str, within_s: float) -> Found:
    """A node's part: what this one is and reaches. within_s: how long the others may take to begin."""
    prepared = _read_prepared(folder, token)
    nodes = prepared["nodes"] if prepared else [node]
    problems: list[str] = []
    others = [one for one in nodes if one != node]
    own = next(filter(None, map(route, others)), "") if others else "127.0.0.1"
    if others and (not own or is_loopback(own)):
        problems.append(f"there is no way from it to {', '.join(others)}" if not own else f"its way to others is {own}")
    found = Found(
        node,
        own,
        versions={name: version for name, version, _ in package_findings() if version != "missing"},
        python=platform.python_version(),
        gpus=[seen for part, seen, _ in gpu_findings() if part != "GPU"],
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        problems=problems,
    )
    if not prepared:
        problems.append(f"it does not see {folder}, which all nodes must share")
    elif unseen := [path for path in prepared["must_see"] if not Path(path).exists()]:
        problems.append(f"it does not see {', '.join(unseen)}")
    if problems:
        return found
    with _Clock(own) as clock:
        found.ports.extend(free_port(own) for _ in range(5))
        place = {"address": own, "port": clock.port, "ports": found.ports}
        alike = {part: getattr(found, part) for part in _PARTS}
        write_whole(folder / f"{node}.here", json.dumps(place | {"alike": alike}))
        places = _places(folder, nodes, within_s)
        offsets = {other: _offset(place["address"], place["port"]) for other, place in places.items()}
        found.unreachable.extend(other for other in nodes if offsets.get(other) is None)
        write_whole(folder / f"{node}.reached", json.dumps(found.unreachable))
        reached = _read_all(folder, [f"{one}.reached" for one in places], _REACH_S * len(nodes) + _SHOWN_S)
        whole = len(reached) == len(nodes) and not any(reached.values())
        if whole and len(nodes) > 1 and all(place["alike"] == alike for place in places.values()):
            found.unreachable.extend(_sums(node, nodes, places, folder))
    return replace(found, offset_s=-(offsets.get(nodes[0]) or 0.0))


def _read_prepared(folder: Path, token: str) -> dict[str, list[str]] | None:
    """What `prepare` has written, if this node sees it."""
    try:
        return json.loads((folder / _NODES).read_text()) if (folder / _SHARED).read_text() == token else None
    except OSError:
        return None


class _Clock:
    """Tells who connects the time."""

    def __init__(self, address: str):
        self._socket = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        self.port = self._socket.getsockname()[1]

    def __enter__(self) -> _Clock:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                with connection, suppress(OSError):
                    connection.sendall(repr(time.time()).encode())


def _offset(address: str, port: int) -> float | None:
    """How far another node's clock is ahead of this one's, seconds; None where it does not answer."""
    try:
        before = time.time()
        with socket.create_connection((address, port), timeout=_REACH_S) as connection:
            connection.settimeout(_REACH_S)
            told = connection.recv(64)
        return float(told) - (before + time.time()) / 2
    except (OSError, ValueError):
        return None


def _sums(node: str, nodes: Sequence[str], places: Mapping[str, dict], folder: Path) -> list[str]:
    """Have all nodes sum a number over the network that training will use; with whom this one cannot."""
    if _sum(node, nodes, places, places[nodes[0]]["ports"][0], _SUM_S):
        return []
    others = []
    for turn, pair in _pairs(node, nodes):
        write_whole(folder / f"{node}.pair{turn}", "0")
        _read_all(folder, [f"{one}.pair{turn}" for one in pair], _SUM_S + _SHOWN_S)
        if not _sum(node, pair, places, places[pair[0]]["ports"][2 + turn], _PAIR_S):
            others += [one for one in pair if one != node]
    return others or [one for one in nodes if one != node]


def _pairs(node: str, nodes: Sequence[str]) -> list[tuple[int, list[str]]]:
    """This node with each of its neighbours in a ring, and in which turn: in none is a node in two pairs."""
    count, found = len(nodes), []
    for place in range(count if count > 2 else 1):
        pair = [nodes[place], nodes[(place + 1) % count]]
        turn = 2 if place == count - 1 and count % 2 else place % 2
        if node in pair:
            found.append((turn, pair))
    return sorted(found)


def _sum(node: str, nodes: Sequence[str], places: Mapping[str, dict], port: int, limit_s: float) -> bool:
    """Whether these nodes, of which this is one, can sum a number."""
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    limit = datetime.timedelta(seconds=limit_s)
    rank = nodes.index(node)
    try:
        store = dist.TCPStore(places[nodes[0]]["address"], port, len(nodes), rank == 0, limit)
        if on_gpu:
            group = dist.ProcessGroupNCCL(store, rank, len(nodes))
        else:
            options = dist.ProcessGroupGloo._Options()
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=places[node]["address"])]
            options._timeout = limit
            group = dist.ProcessGroupGloo(store, rank, len(nodes), options)
        one = torch.ones(1, device="cuda" if on_gpu else "cpu")
        group.allreduce([one]).wait(limit)
        group.barrier().wait(limit)
        return one.item() == len(nodes)
    except RuntimeError as error:
        print(f"{node}, with {', '.join(nodes)}: {str(error).splitlines()[0]}", file=sys.stderr)
        return False


def _places(folder: Path, nodes: Sequence[str], within_s: float) -> dict[str, dict]:
    found = _read_all(folder, [f"{node}.here" for node in nodes], within_s)
    return {name.removesuffix(".here"): place for name, place in found.items()}


def _read_all(folder: Path, names: Sequence[str], within_s: float) -> dict[str, dict]:
    end, found = time.monotonic() + within_s, {}
    while len(found) < len(names) and time.monotonic() < end:
        for name in set(names) - set(found):
            with suppress(OSError, ValueError):
                found[name] = json.loads((folder / name).read_text())
        time.sleep(0.05)
    return found


def bad_nodes(nodes: Sequence[str], found: Mapping[str, Found]) -> dict[str, list[str]]:
    """What is wrong with each node that something is wrong with. found: of those that have told."""
    bad: dict[str, list[str]] = {node: ["it has told nothing"] for node in nodes if node not in found}
    for node, one in found.items():
        if one.problems:
            bad.setdefault(node, []).extend(one.problems)
    rest = [one for node, one in found.items() if node not in bad]
    apart = {frozenset((one.node, other)) for one in rest for other in one.unreachable if other not in bad}
    while apart:
        (worst, most), *others = Counter(node for pair in apart for node in pair).most_common()
        # Who has the most to do with it is it, or all of those that have: of two alone it does not show which.
        for node in [worst, *(other for other, count in others if count == most)]:
            its = sorted({other for pair in apart for other in pair if node in pair} - {node})
            bad.setdefault(node, []).append(f"it and {', '.join(its)} do not reach each other")
        apart = {pair for pair in apart if not pair & bad.keys()}
    rest = [one for one in rest if one.node not in bad]
    for part in _PARTS:
        usual, _ = Counter(_shown(getattr(one, part)) for one in rest).most_common(1)[0] if rest else ("", 0)
        for one in rest:
            if (own := _shown(getattr(one, part))) != usual:
                bad.setdefault(one.node, []).append(f"{part}: {_differing(own, usual)}, and most have the other")
    rest = [one for one in rest if one.node not in bad]
    usual_bytes = sorted(one.memory_bytes for one in rest)[len(rest) // 2] if rest else 0
    for one in rest:
        if one.memory_bytes < _MEMORY * usual_bytes:
            own, usual = data_size(one.memory_bytes), data_size(usual_bytes)
            bad.setdefault(one.node, []).append(f"memory: {own}, and most have {usual}")
    if rest:
        middle = sorted(one.offset_s for one in rest)[len(rest) // 2]
        for one in rest:
            if abs(late_s := one.offset_s - middle) > CLOCK_S:
                bad.setdefault(one.node, []).append(f"its clock is {late_s:+.1f} s beside the others'")
    return {node: bad[node] for node in nodes if node in bad}


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {value[key]}" for key in sorted(value))
    if isinstance(value, list):
        return ", ".join(f"{count} x {name}" for name, count in Counter(value).items()) or "none"
    return str(value)


def _differing(own: str, usual: str) -> str:
    mine, theirs = own.split(", "), usual.split(", ")
    lacks, has = [one for one in theirs if one not in mine], [one for one in mine if one not in theirs]
    return f"{', '.join(has) or 'nothing'} in place of {', '.join(lacks) or 'nothing'}"


def table(nodes: Sequence[str], found: Mapping[str, Found], bad: Mapping[str, list[str]]) -> str:
    """What all nodes have told, as it is shown."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="Nodes", title_justify="left", title_style="bold")
    for name in ("node", "address", "GPUs", "CPUs", "memory", "clock", ""):
        shown.add_column(name, overflow="fold")
    for node in nodes:
        one = found.get(node, Found(node))
        memory, clock = data_size(one.memory_bytes), f"{one.offset_s:+.3f} s"
        known = [one.address, _shown(one.gpus), str(one.cpus), memory, clock] if one.cpus else [""] * 5
        shown.add_row(node, *known, "; ".join(bad.get(node, ["fits"])))
    console = Console(width=160)
    with console.capture() as captured:
        console.print(shown)
    return captured.get()
