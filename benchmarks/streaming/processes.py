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


class CpuMeter:
    """Adds up CPU by role; of a process that has ended, what it had taken when last read.

    Attributes:
        ended: Roles of which a process has ended.
    """

    def __init__(self, processes: dict[str, list[psutil.Process]]) -> None:
        self._processes = processes
        self._seconds: dict[psutil.Process, float] = {}
        self.ended: list[str] = []

    def read(self) -> dict[str, float]:
        """CPU that each role has taken so far, in user and system mode."""
        return {
            role: sum(self._read_one(role, process) for process in members)
            for role, members in self._processes.items()
        }

    def _read_one(self, role: str, process: psutil.Process) -> float:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            if role not in self.ended:
                self.ended.append(role)
        else:
            self._seconds[process] = times.user + times.system
        return self._seconds.get(process, 0.0)
