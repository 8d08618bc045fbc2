"""By which interface ranks on several hosts reach each other, and what is refused."""

from __future__ import annotations

import socket

import pytest

from megatron_apo.runtime.hosts import Place, _wait_for_store, interface_of, join_store, loopback_problem, route
from megatron_apo.runtime.job import Job
from megatron_apo.runtime.ports import free_port

INTERFACES = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.1"], "ib0": ["10.1.0.1", "fe80::1"]}
ROUTES = {
    "10.0.0.2": "10.0.0.1",
    "10.0.0.3": "10.0.0.1",
    "10.1.0.2": "10.1.0.1",
    "10.0.0.1": "127.0.0.1",
    "8.8.8.8": "",
}


def test_the_interface_that_leads_to_the_others() -> None:
    assert interface_of(["10.0.0.2", "10.0.0.3"], ROUTES.__getitem__, INTERFACES) == ("eth0", "")
    assert interface_of(["10.1.0.2"], ROUTES.__getitem__, INTERFACES) == ("ib0", "")


@pytest.mark.parametrize(
    ("addresses", "why"),
    [
        (["10.0.0.1"], "no interface of its own leads to 10.0.0.1"),  # by loopback
        (["8.8.8.8"], "no interface of its own leads to 8.8.8.8"),
        (["10.0.0.2", "10.1.0.2"], "it reaches 10.0.0.2 by eth0, 10.1.0.2 by ib0, and gloo listens on one"),
    ],
)
def test_no_interface(addresses: list[str], why: str) -> None:
    assert interface_of(addresses, ROUTES.__getitem__, INTERFACES) == (None, why)


def test_a_loopback_master_is_a_mistake_between_hosts_only() -> None:
    """Rank 0's own way to it may be loopback: its host's name often is."""
    first, beside = Place("a", "n0", "127.0.0.1"), Place("a", "n0", "127.0.1.1")
    assert loopback_problem("n0", [first, beside, Place("b", "n1", "10.0.0.2")]) is None
    said = loopback_problem("localhost", [first, beside, Place("b", "n1", "127.0.0.1")])
    assert said == (
        "MASTER_ADDR: localhost is a loopback address, and rank 2 is on another host (n1) than rank 0 (n0); give the "
        "address by which other hosts reach rank 0's"
    )


def test_a_route_is_the_kernels() -> None:
    assert route("127.0.0.1") == "127.0.0.1"
    assert route("localhost") in ("127.0.0.1", "::1")
    assert route("no-such-host.invalid") == ""


def test_a_store_that_does_not_answer_is_one_line() -> None:
    port = free_port("127.0.0.1")
    with pytest.raises(ConnectionError) as error:
        _wait_for_store(Job(1, 2, "127.0.0.1", port), 0.5)
    assert f"127.0.0.1:{port} has not answered rank 1 ({socket.gethostname()}) in 0.5 s" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConnectionError, match=f"rank 0 cannot open the job's store at 127.0.0.1:{port} ") as error:
            join_store(Job(0, 2, "127.0.0.1", port), 1.0)
    assert "\n" not in str(error.value)
