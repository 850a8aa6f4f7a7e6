"""What processes listen on beyond loopback, and whether docs/security.md names them.

Run on a host of a test, prints the ports of all its processes as JSON.
"""

import ipaddress
import json
import re
from collections.abc import Iterable
from pathlib import Path

import psutil

SECURITY_PAGE = Path(__file__).resolve().parents[2] / "docs" / "security.md"


def open_ports(processes: Iterable[psutil.Process]) -> dict[int, str]:
    """What processes of this network namespace listen on beyond loopback: their names, by port."""
    found = {}
    for each in processes:
        try:
            words, connections = each.cmdline(), each.net_connections("tcp")
        except psutil.NoSuchProcess:
            continue
        for connection in connections:
            if connection.status == psutil.CONN_LISTEN and not _is_loopback(connection.laddr.ip):
                found[connection.laddr.port] = _name(words)
    return found


def undocumented(names: Iterable[str]) -> list[str]:
    """Those names that begin with none in the first column of the page's table."""
    rows = [line for line in SECURITY_PAGE.read_text().splitlines() if line.startswith("| `")]
    known = tuple(name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0]))
    return [name for name in names if not name.startswith(known)]


def _name(words: list[str]) -> str:
    """What a process runs: a script or a module, where it is Python that runs it."""
    if "-m" in words:
        return words[words.index("-m") + 1]
    if not Path(words[0]).name.startswith("python"):
        return Path(words[0]).name
    return next((Path(word).name for word in words[1:] if not word.startswith("-")), "python")


def _is_loopback(text: str) -> bool:
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


if __name__ == "__main__":
    print(json.dumps(open_ports(psutil.process_iter())))
