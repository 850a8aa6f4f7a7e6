"""The processes of a server by their part in streaming, and the CPU that each part has taken."""

import psutil

ROLES = ("router", "leader", "proxy")


def find_processes(server_pid: int) -> dict[str, list[psutil.Process]]:
    """The processes of each role among the server's; this one is the client.

    Raises:
        RuntimeError: A role has none.
    """
    found: dict[str, list[psutil.Process]] = {role: [] for role in ROLES}
    for process in psutil.Process(server_pid).children(recursive=True):
        title = " ".join(process.cmdline()[:1])
        if title.startswith("ray::ServeReplica"):
            found["router" if title.endswith("Router") else "leader"].append(process)
        elif "haproxy" in title.lower() or "ProxyActor" in title:
            found["proxy"].append(process)
    if missing := [role for role, processes in found.items() if not processes]:
        raise RuntimeError(f"there is no process of {', '.join(missing)}")
    return found | {"client": [psutil.Process()]}


def cpu_seconds(processes: dict[str, list[psutil.Process]]) -> dict[str, float]:
    """CPU that each role has taken so far, in user and system mode."""
    totals = {}
    for role, members in processes.items():
        times = [process.cpu_times() for process in members]
        totals[role] = sum(each.user + each.system for each in times)
    return totals
