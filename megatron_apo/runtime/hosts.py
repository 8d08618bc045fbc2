"""Joins a job's store, and finds the network interface by which its ranks reach each other.

Gloo listens on the address that a host's own name resolves to. Debian's /etc/hosts resolves it to 127.0.1.1, which no
other host reaches. So before there is a process group, the ranks tell each other through the job's store which host
each is on, and by which of its addresses it reaches the one of rank 0; that host takes its routes to theirs. A job on
one host is left as it is.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch.distributed as dist

from megatron_apo.runtime.job import Job

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_LOOPBACK_LIMIT_S = 120.0  # rank 0 of this host imports what this rank has imported


@dataclass(frozen=True)
class Place:
    """Where a rank is. `host` differs between machines and between network namespaces of one."""

    host: str
    name: str
    address: str  # of this host, on the way to rank 0's


def join_store(job: Job, timeout_s: float) -> dist.Store:
    """This rank's client of the job's store, which rank 0 opens unless torchrun has. Raises `ConnectionError`."""
    serves = job.rank == 0 and not job.agent_has_store
    if not serves:
        _wait_for_store(job, timeout_s)
    try:
        return _store(job, timeout_s, serves)
    except RuntimeError as error:
        raise ConnectionError(
            f"MASTER_ADDR, MASTER_PORT: rank {job.rank} cannot {'open' if serves else 'join'} the job's store at "
            f"{job.master_address}:{job.master_port} ({str(error).splitlines()[0]}); give an address of rank 0's host "
            "and a port that is free there"
        ) from error


def store_client(job: Job, timeout_s: float) -> dist.Store:
    """Another client of the same store. Raises at once where none answers."""
    socket.create_connection((job.master_address, job.master_port), timeout=timeout_s).close()
    return _store(job, timeout_s, False)


def _store(job: Job, timeout_s: float, serves: bool) -> dist.Store:
    limit = datetime.timedelta(seconds=timeout_s)
    address, port = job.master_address, job.master_port
    store = dist.TCPStore(address, port, None, serves, limit, wait_for_workers=False, multi_tenant=serves)
    return dist.PrefixStore(f"megatron-apo/{job.attempt}", store)


def meet(job: Job, store: dist.Store, timeout_s: float) -> list[Place]:
    """Every rank's place, told by each to all; then the interface is chosen, where there are several hosts.

    Raises `ConnectionError` for ranks that do not come, a ValueError, the same on every rank, where hosts cannot reach
    each other.
    """
    own = Place(this_host(), socket.gethostname(), route(job.master_address))
    places = [Place(**json.loads(text)) for text in _exchange(job, store, "place", json.dumps(asdict(own)), timeout_s)]
    if len({place.host for place in places}) == 1:
        return places
    problem = loopback_problem(job.master_address, places)
    if problem is None:
        problem = _choose_interface(own, places)
    if problems := [text for text in _exchange(job, store, "interface", problem or "", timeout_s) if text]:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    return places


def loopback_problem(master_address: str, places: Sequence[Place]) -> str | None:
    """What is wrong where a rank on another host than rank 0's reaches it by a loopback address."""
    for rank, place in enumerate(places):
        if place.host != places[0].host and is_loopback(place.address):
            return (
                f"MASTER_ADDR: {master_address} is a loopback address, and rank {rank} is on another host "
                f"({place.name}) than rank 0 ({places[0].name}); give the address by which other hosts reach rank 0's"
            )
    return None


def interface_of(
    addresses: Sequence[str], routes: Callable[[str], str], interfaces: dict[str, list[str]]
) -> tuple[str | None, str]:
    """(The one interface by which all `addresses` are reached, ""), or (None, why there is none).

    routes: the local address on the way to one; interfaces: the addresses of each.
    """
    found = {}
    for address in addresses:
        local = routes(address)
        name = next((name for name, own in interfaces.items() if local in own), None)
        if name is None or is_loopback(local):
            return None, f"no interface of its own leads to {address}"
        found[name] = address
    if len(found) > 1:
        ways = ", ".join(f"{address} by {name}" for name, address in sorted(found.items()))
        return None, f"it reaches {ways}, and gloo listens on one"
    return next(iter(found)), ""


def _choose_interface(own: Place, places: Sequence[Place]) -> str | None:
    """Set gloo's and NCCL's interface, unless the user has; returns what is wrong."""
    interfaces = {
        name: [address.address.partition("%")[0] for address in addresses if address.family in _FAMILIES]
        for name, addresses in psutil.net_if_addrs().items()
    }
    if chosen := os.environ.get(GLOO):
        names = [name for name in chosen.split(",") if not all(map(is_loopback, interfaces.get(name, [])))]
        if not names:
            return (
                f"{GLOO}: {chosen} on {own.name} leads to no other host, and the ranks are on several; leave it out, "
                f"or give one of {', '.join(sorted(interfaces))}"
            )
        return None
    others = sorted({place.address for place in places if place.host != places[0].host})
    targets = others if own.host == places[0].host else [own.address]
    # A host that is not rank 0's has looked up its route already: its own address is on the interface.
    routes = route if own.host == places[0].host else lambda address: address
    name, why = interface_of(targets, routes, interfaces)
    if name is None:
        return (
            f"{GLOO}: not set, and none can be chosen on {own.name}: {why}; set it there to the interface that "
            "reaches the other hosts"
        )
    os.environ[GLOO] = name
    os.environ.setdefault(NCCL, f"={name}")  # "=": this name, not all that begin with it
    return None


_FAMILIES = (socket.AF_INET, socket.AF_INET6)


def _exchange(job: Job, store: dist.Store, name: str, value: str, timeout_s: float) -> list[str]:
    """Every rank's `value`. Raises `ConnectionError`, naming ranks that gave none in time."""
    keys = [f"{name}/{rank}" for rank in range(job.world_size)]
    store.set(keys[job.rank], value)
    try:
        return [text.decode() for text in store.multi_get(keys)]
    except RuntimeError as error:
        try:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        except RuntimeError:
            missing = []
        hint = ""
        if is_loopback(route(job.master_address)):
            hint = f", and MASTER_ADDR={job.master_address} has to be an address by which their host reaches this one"
        raise ConnectionError(
            f"parallel.timeout_s: ranks {', '.join(map(str, missing))} of {job.world_size} have not joined the job in "
            f"{timeout_s:g} s; see what they said{hint}"
        ) from error


def _wait_for_store(job: Job, timeout_s: float) -> None:
    """Until the store's port answers. Quieter than torch, which shows its own stack for each attempt."""
    loopback = is_loopback(route(job.master_address))
    limit = min(timeout_s, _LOOPBACK_LIMIT_S) if loopback else timeout_s
    end = time.monotonic() + limit
    while True:
        try:
            socket.create_connection((job.master_address, job.master_port), timeout=limit).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                fix = "see what rank 0 said"
                if loopback:
                    fix = "it leads to no other host: if rank 0 is on one, give the address of that"
                raise ConnectionError(
                    f"MASTER_ADDR, MASTER_PORT: {job.master_address}:{job.master_port} has not answered rank "
                    f"{job.rank} ({socket.gethostname()}) in {limit:g} s ({error}); {fix}"
                ) from error
            time.sleep(0.1)


def this_host() -> str:
    """A name that tells this host, and this network namespace of it, from others."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"


def route(address: str) -> str:
    """The address of this host from which packets to `address` would leave; "" where none would. Sends nothing."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            return probe.getsockname()[0].partition("%")[0]
    except OSError:
        return ""


def own_address(address: str) -> str:
    """This host's address for the others of its job: on gloo's interface where one was chosen (`meet`), else on the way
    to `address`."""
    names = os.environ.get(GLOO, "").split(",")
    for one in (one for name in names for one in psutil.net_if_addrs().get(name, [])):
        if one.family in _FAMILIES:
            return one.address.partition("%")[0]
    return route(address)


def names_loopback(host: str) -> bool:
    """Whether a name or an address is of this host's loopback alone."""
    try:
        found = {str(target[0]).partition("%")[0] for *_, target in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(map(is_loopback, found))


def is_loopback(address: str) -> bool:
    return address != "" and ipaddress.ip_address(address).is_loopback
