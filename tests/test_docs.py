"""The documents against the source that they speak of."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()


def source_texts() -> set[str]:
    """Every text in the source, with … in the place of what varies."""
    files = [*(ROOT / "cluster").rglob("*.py"), *(ROOT / "engine").rglob("*.py")]
    files += [ROOT / "serve_app.py", *(ROOT / "scripts").glob("*.py")]
    texts = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.add("".join(_part(value) for value in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(re.sub(r"%[.0-9]*[sdfr]", "…", node.value))
    return texts


def _part(value: ast.expr) -> str:
    return str(value.value) if isinstance(value, ast.Constant) else "…"


def quoted_symptoms() -> Iterator[str]:
    """What each row quotes as seen: the code spans of its first cell."""
    for line in PAGE.splitlines():
        if line.startswith("| ") and not line.startswith("| what you see"):
            yield from re.findall(r"`([^`]+)`", line.split(" | ")[0])


def test_every_symptom_in_the_troubleshooting_page_is_one_that_the_system_shows():
    texts = source_texts()
    # A message may end in a varying part of its own, and be quoted from anywhere inside.
    unknown = [
        symptom
        for symptom in quoted_symptoms()
        if not (symptom.startswith("--") and " " not in symptom)
        if not any(symptom.strip("… ") in text for text in texts)
    ]
    assert unknown == []


def test_flags_in_the_troubleshooting_page_exist():
    known = set(re.findall(r"`(--[a-z-]+)`", (ROOT / "docs" / "flags.md").read_text()))
    others = {"--tpu", "--gpu", "--generate"}
    assert set(re.findall(r"(--[a-z][a-z-]+[a-z])", PAGE)) - known - others == set()


@pytest.mark.parametrize("script", ["make_flags_doc.py", "make_monitoring.py"])
def test_generated_pages_are_what_their_scripts_write(script: str):
    done = subprocess.run(
        [sys.executable, f"scripts/{script}", "--check"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
