"""Ports that can be bound, and hosts as they stand before a port."""

import socket

import pytest

from cluster.addresses import bracketed, free_port


@pytest.mark.parametrize("address", ["127.0.0.1", ""])
def test_free_port_can_be_bound(address: str) -> None:
    with socket.create_server((address, free_port(address))):
        pass


def test_only_numeric_ipv6_addresses_get_brackets() -> None:
    hosts = ["10.0.0.7", "tpu-7", "fe80::7"]
    assert [bracketed(host) for host in hosts] == ["10.0.0.7", "tpu-7", "[fe80::7]"]
