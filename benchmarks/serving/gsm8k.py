"""Word problems in gsm8k's format, and the prompt that asks one of them.

A line of the file is {"question": "…", "answer": "steps\\n#### 18"}. With examples, the prompt is
the chain of thought of Wei et al. (arXiv 2201.11903) in the words of Qwen's own evaluation of its
chat models (eval/evaluate_chat_gsm8k.py in QwenLM/Qwen); without, as there, it is the question.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving.errors import BenchmarkError
from benchmarks.serving.final_number import number_behind_hashes

QUESTION_WORD = "Question:"
# What gsm8k's own answers write between steps for a calculator: 2 * 3 = <<2*3=6>>6.
_CALCULATOR_NOTE = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One line of a file.

    Attributes:
        line: Its number in the file, from 1.
        steps: What leads to the number, without notes for a calculator.
        number: As `final_number` spells it.
    """

    line: int
    question: str
    steps: str
    number: str


def read_problems(path: str, *, flag: str, limit: int | None = None) -> list[Problem]:
    """Read the first `limit` problems of a file; empty lines are none.

    Args:
        flag: That named the file, for messages.

    Raises:
        BenchmarkError: The file cannot be read, a line is faulty (which one is said), or there is
            no problem in it.
    """
    problems: list[Problem] = []
    try:
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if len(problems) == limit:
                    break
                if line.strip():
                    problems.append(_read_line(line, number, where=f"{flag}={path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{flag}={path} cannot be read: {error}") from error
    if not problems:
        raise BenchmarkError(f"{flag}={path} has no line with a problem.")
    return problems


def make_prompt(question: str, examples: Sequence[Problem]) -> str:
    """Write the one message that asks a question, behind solved examples if there are any."""
    if not examples:
        return question
    solved = [
        f"{_asked(example.question)}\n{example.steps}\nThe answer is {example.number}"
        for example in examples
    ]
    return "\n\n".join([*solved, _asked(question)])


def _asked(question: str) -> str:
    return f"{QUESTION_WORD} {question}\nLet's think step by step"


def _read_line(line: str, number: int, *, where: str) -> Problem:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise BenchmarkError(f"{where}: no JSON: {error}") from error
    if not isinstance(row, dict):
        raise BenchmarkError(f"{where}: a {type(row).__name__}, and an object is needed.")
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str):
        raise BenchmarkError(
            f"{where}: question and answer must both be texts; the line has "
            f"{', '.join(row) or 'nothing'}."
        )
    right = number_behind_hashes(answer)
    if right is None:
        raise BenchmarkError(
            f"{where}: the answer has no line such as #### 18; it ends in {answer[-40:]!r}."
        )
    steps = _CALCULATOR_NOTE.sub("", answer.rpartition("####")[0]).strip()
    return Problem(line=number, question=question.strip(), steps=steps, number=right)
