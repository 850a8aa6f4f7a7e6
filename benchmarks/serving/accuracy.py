"""What an evaluation's answers come to: how many are right, and how sure that figure is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.gsm8k import Problem
from benchmarks.serving.report import WIDTH, Summary, format_line
from benchmarks.serving.results import RequestResult

# Of a normal distribution, 95 % lies within so many standard deviations.
Z_95 = 1.959964


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one problem; a failed request has no number and is not right.

    Attributes:
        number: What the answer came to, as `final_number` finds it.
    """

    problem: Problem
    result: RequestResult
    number: str | None

    @property
    def is_right(self) -> bool:
        return self.number == self.problem.number


def describe(outcome: Outcome) -> dict[str, Any]:
    """What a file of answers says of one."""
    problem, result = outcome.problem, outcome.result
    return {
        "line": problem.line,
        "question": problem.question,
        "prompt": result.request.prompt,
        "answer": result.text,
        "thoughts": result.thoughts,
        "extracted": outcome.number,
        "expected": problem.number,
        "right": outcome.is_right,
        "finish_reason": result.finish_reason,
        "output_tokens": result.output_len,
        "seconds": round(result.latency_s, 3),
        "error": result.error,
    }


def summarise(outcomes: Sequence[Outcome], duration_s: float) -> Summary:
    """Compute the figures; accuracy is that of the requests that did not fail."""
    done = [outcome for outcome in outcomes if outcome.result.error is None]
    num_right = sum(outcome.is_right for outcome in done)
    num_tokens = sum(outcome.result.output_len for outcome in done)
    low, high = wilson_interval(num_right, len(done))
    return {
        "answers": len(done),
        "right": num_right,
        "accuracy": num_right / len(done) if done else None,
        "accuracy_low": low,
        "accuracy_high": high,
        "without_number": sum(outcome.number is None for outcome in done),
        "cut": sum(outcome.result.finish_reason == "length" for outcome in done),
        "failed": len(outcomes) - len(done),
        "mean_output_tokens": num_tokens / len(done) if done else None,
        "output_throughput": num_tokens / duration_s,
        "duration": duration_s,
    }


def wilson_interval(num_right: int, num_answers: int) -> tuple[float | None, float | None]:
    """Wilson's 95 % score interval of a share: where the model's true accuracy may well lie."""
    if not num_answers:
        return None, None
    share, z_square = num_right / num_answers, Z_95**2
    centre = share + z_square / (2 * num_answers)
    margin = Z_95 * math.sqrt(share * (1 - share) / num_answers + z_square / (4 * num_answers**2))
    scale = 1 + z_square / num_answers
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)


def format_table(summary: Summary, headings: Mapping[str, object]) -> str:
    """Lay the figures out as the serving benchmark does.

    Args:
        headings: Lines that come first: what was measured.
    """
    low, high = summary["accuracy_low"], summary["accuracy_high"]
    accuracy = summary["accuracy"]
    lines = {
        **headings,
        "Answers": summary["answers"],
        "Right": summary["right"],
        "Accuracy": None if accuracy is None else f"{accuracy:.3f}",
        "95 % interval": None if low is None else f"{low:.3f} to {high:.3f}",
        "Answers without a number": summary["without_number"],
        "Answers cut by --max-tokens": summary["cut"],
        "Failed requests": summary["failed"],
        "Mean output tokens": summary["mean_output_tokens"],
        "Output tokens/s": summary["output_throughput"],
        "Duration (s)": summary["duration"],
    }
    rows = [format_line(f"{name}:", value) for name, value in lines.items()]
    return "\n".join([f"{' Accuracy ':=^{WIDTH}}", *rows, "=" * WIDTH])
