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


def write_gsm8k(folder: Path, num_problems: int) -> Path:
    """Make a folder with gsm8k's two files: eight worked examples, and problems to solve."""
    folder.mkdir()
    write_problems(folder / "train.jsonl", range(2, 10))
    write_problems(folder / "test.jsonl", range(10, 10 + num_problems))
    return folder.resolve()
