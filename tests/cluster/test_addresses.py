"""Ports that can be bound, and hosts as they stand before a port."""

import socket
from pathlib import Path

import pytest

from cluster.addresses import bracketed, free_port, port_for_later


@pytest.mark.parametrize("address", ["127.0.0.1", ""])
def test_free_port_can_be_bound(address: str) -> None:
    with socket.create_server((address, free_port(address))):
        pass


def test_no_outgoing_connection_gets_a_port_for_later() -> None:
    least = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = {port_for_later() for _ in range(20)}
    assert len(ports) > 1
    assert max(ports) < least
    with socket.create_server(("", port_for_later())):
        pass


def test_only_numeric_ipv6_addresses_get_brackets() -> None:
    hosts = ["10.0.0.7", "tpu-7", "fe80::7"]
    assert [bracketed(host) for host in hosts] == ["10.0.0.7", "tpu-7", "[fe80::7]"]
