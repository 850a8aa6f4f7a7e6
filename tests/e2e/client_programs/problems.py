"""A few word problems as files of gsm8k's format, for the clients that evaluate."""

import json
from pathlib import Path


def write_problems(path: Path, numbers: range) -> Path:
    """Write one problem for each number."""
    rows = [
        {
            "question": f"Ann has {n} eggs and buys {n} more. How many has she?",
            "answer": f"{n} + {n} = <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}",
        }
        for n in numbers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
