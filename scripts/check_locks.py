"""Checks, without a network, that the lock files answer pyproject.toml.

What it cannot see is that a newer version exists: `scripts/lock --upgrade` is for that.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYTHON_VERSIONS = ("3.11", "3.12", "3.13")
# Which extras and dependency groups each lock carries, as scripts/lock compiles them.
LOCKS = {
    "requirements.lock": (("demo",), ("build",)),
    "requirements-dev.lock": (("demo",), ("build", "dev")),
    "requirements-tpu.lock": (("demo", "tpu"), ("build",)),
    "requirements-gpu.lock": (("demo", "gpu"), ("build",)),
    "requirements-gcp.lock": (("demo", "gcp"), ("build",)),
}


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    faults = []
    for name, (extras, groups) in LOCKS.items():
        text = (ROOT / name).read_text()
        faults += [f"{name}: line {number} names an index or a path" for number in addresses(text)]
        pins = read_pins(text)
        for wanted in requirements(project, extras, groups):
            faults += [f"{name}: {fault}" for fault in unanswered(wanted, pins)]
    for fault in faults:
        print(fault)
    if faults:
        print("Run scripts/lock and commit what it writes.")
    return 1 if faults else 0


def requirements(project: dict, extras: tuple[str, ...], groups: tuple[str, ...]) -> list[str]:
    """List what pyproject.toml asks of one lock."""
    wanted = list(project["project"]["dependencies"])
    for extra in extras:
        wanted += project["project"]["optional-dependencies"][extra]
    for group in groups:
        wanted += project["dependency-groups"][group]
    return wanted


def read_pins(text: str) -> list[Requirement]:
    """Read the pinned requirements of a lock file, hashes left out."""
    pins = re.findall(r"^([A-Za-z0-9][^#\n\\]*==[^#\n\\]*)", text, flags=re.MULTILINE)
    return [Requirement(pin.strip()) for pin in pins]


def addresses(text: str) -> Iterator[int]:
    """Find lines that would tie the lock to a machine."""
    for number, line in enumerate(text.splitlines(), start=1):
        if re.search(r"://|^--(index|extra|find)|file:|@ ", line):
            yield number


def unanswered(wanted: str, pins: list[Requirement]) -> Iterator[str]:
    """Find Python versions for which no pin satisfies a requirement."""
    requirement = Requirement(wanted)
    for python in PYTHON_VERSIONS:
        environment = {"python_version": python, "python_full_version": f"{python}.0"}
        versions = [
            next(iter(pin.specifier)).version
            for pin in pins
            if canonicalize_name(pin.name) == canonicalize_name(requirement.name)
            and (pin.marker is None or pin.marker.evaluate(environment))
        ]
        if not any(requirement.specifier.contains(version) for version in versions):
            got = ", ".join(versions) or "none"
            yield f"no pin for {wanted} with Python {python}; pinned: {got}"


if __name__ == "__main__":
    sys.exit(main())
