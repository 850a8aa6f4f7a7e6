"""Addresses and ports of this machine. Knows neither Ray nor JAX nor ZMQ."""

import random
import socket

# Below those that systems give to outgoing connections, above those of Ray's workers.
_LATER_PORTS = range(20_000, 30_000)


def family_of(address: str) -> socket.AddressFamily:
    """The family of a numeric address or, for names, IPv4."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def bracketed(host: str) -> str:
    """A host as it stands before `:port`: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def free_port(address: str) -> int:
    """A TCP port of `address`, one of this machine's, that nothing listens on at present.

    Args:
        address: Empty for a port that is free on all IPv4 addresses.
    """
    with socket.socket(family_of(address), socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def port_for_later() -> int:
    """A TCP port, free on all IPv4 addresses, that somebody is to listen on in some seconds.

    One of `free_port` might be an outgoing connection's by then.
    """
    for port in random.sample(_LATER_PORTS, 100):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    return free_port("")
