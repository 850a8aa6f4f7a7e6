"""Ask about processes that may end while they are asked."""

import os

import psutil


def descendants(pid: int | None = None) -> dict[psutil.Process, str]:
    """Every process below `pid` (default: this one) that still runs, with its name."""
    found = {}
    for process in psutil.Process(pid or os.getpid()).children(recursive=True):
        try:
            found[process] = process.name()
        except psutil.NoSuchProcess:
            continue
    return found


def listens(process: psutil.Process, port: int) -> bool:
    """Whether the process accepts TCP connections at `port`; one that has ended does not."""
    try:
        connections = process.net_connections("tcp")
    except psutil.NoSuchProcess:
        return False
    return any(
        connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        for connection in connections
    )
