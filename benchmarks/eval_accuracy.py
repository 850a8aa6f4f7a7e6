"""Measures how often a running server's model is right: word problems as gsm8k has them.

    scripts/quickstart --port 30000 &
    python benchmarks/eval_accuracy.py --url http://127.0.0.1:30000 --dataset test.jsonl \\
        --shots-file train.jsonl --limit 100 --output answers.jsonl

Speaks to any OpenAI server (chat completions). Files are local; nothing is downloaded. Four solved
examples come first by default, as in evalscope's gsm8k and in the few-shot form of Qwen's own
evaluation of its chat models; `--num-shots 0` is that evaluation's other form, the question alone.
How the prompt reads: serving/gsm8k.py; what counts as an answer: serving/final_number.py.
"""

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from benchmarks.serving.accuracy import Outcome, describe, format_table, summarise
from benchmarks.serving.client import RequestOptions, ServingClient, find_model, open_session
from benchmarks.serving.errors import BenchmarkError
from benchmarks.serving.final_number import final_number
from benchmarks.serving.flags import json_object, positive_float, positive_int
from benchmarks.serving.gsm8k import QUESTION_WORD, Problem, make_prompt, read_problems
from benchmarks.serving.load import run_load
from benchmarks.serving.report import append_json, describe_failures
from benchmarks.serving.results import BenchRequest, RequestResult

NUM_SHOTS = 4


@dataclass(slots=True)
class Evaluation:
    """What an evaluation has found so far."""

    outcomes: list[Outcome] = field(default_factory=list)
    duration_s: float = 0.0
    is_interrupted: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation.

    Returns:
        0; 1 if a request failed; 2 if nothing could be measured; 130 after Ctrl-C.
    """
    arguments = parse_arguments(argv)
    try:
        return asyncio.run(evaluate(arguments))
    except BenchmarkError as error:
        print(f"eval_accuracy: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("server")
    group.add_argument(
        "--url",
        "--base-url",
        default="http://127.0.0.1:30000",
        help="with or without /v1 or /v1/chat/completions; default: http://127.0.0.1:30000",
    )
    group.add_argument("--model", help="default: the first that /v1/models lists")
    group.add_argument("--api-key", metavar="KEY", help="default: OPENAI_API_KEY")
    group.add_argument(
        "--timeout",
        type=positive_float,
        default=600.0,
        metavar="SECONDS",
        help="a request that takes longer has failed; default: 600",
    )
    group.add_argument("--concurrency", type=positive_int, default=8, metavar="N")
    group = parser.add_argument_group("problems")
    group.add_argument(
        "--dataset",
        required=True,
        metavar="FILE",
        help='JSON lines {"question": "…", "answer": "steps\\n#### 18"}, such as gsm8k\'s '
        "test.jsonl",
    )
    group.add_argument("--limit", type=positive_int, metavar="N", help="ask only the first N")
    group.add_argument(
        "--num-shots",
        type=int,
        default=NUM_SHOTS,
        metavar="K",
        help=f"solved examples before the question; default: {NUM_SHOTS}",
    )
    group.add_argument(
        "--shots-file",
        metavar="FILE",
        help="whose first K problems are the examples, such as gsm8k's train.jsonl",
    )
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=positive_int, default=512, help="default: 512")
    group.add_argument("--temperature", type=float, default=0.0, help="default: 0")
    group.add_argument("--seed", type=int, help="sent with each request")
    group.add_argument(
        "--extra-request-body",
        type=json_object,
        default={},
        metavar="JSON",
        help="an object whose keys go into every request",
    )
    group = parser.add_argument_group("results")
    group.add_argument(
        "--output", metavar="FILE", help="a line of JSON for each answer, as they come"
    )
    group.add_argument("--json", metavar="FILE", help="append the figures to it as a line of JSON")
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bar")
    arguments = parser.parse_args(argv)
    if arguments.num_shots < 0:
        parser.error(f"--num-shots={arguments.num_shots} is not at least 0.")
    if arguments.num_shots and arguments.shots_file is None:
        parser.error(
            f"--num-shots={arguments.num_shots} needs --shots-file, where the examples are, such "
            "as gsm8k's train.jsonl. --num-shots 0 asks without."
        )
    return arguments


async def evaluate(arguments: argparse.Namespace) -> int:
    """Read, ask and report; returns the exit status."""
    problems = read_problems(arguments.dataset, flag="--dataset", limit=arguments.limit)
    examples = read_examples(arguments.shots_file, arguments.num_shots)
    base_url = arguments.url.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")
    async with open_session(api_key=arguments.api_key, timeout_s=arguments.timeout) as session:
        model, _ = await find_model(session, base_url, arguments.model)
        body = {"seed": arguments.seed} if arguments.seed is not None else {}
        if examples:
            # A model that goes on with problems of its own has answered by then.
            body["stop"] = [QUESTION_WORD]
        options = RequestOptions(
            model=model,
            is_chat=True,
            streams=False,
            temperature=arguments.temperature,
            ignores_eos=False,
            extra_body=body | arguments.extra_request_body,
            keeps_text=True,
        )
        client = ServingClient(session, base_url, options)
        with open_output(arguments.output) as output:
            evaluation = await ask_all(client, problems, examples, arguments, output)
    return show(evaluation, arguments, model, len(problems))


def read_examples(path: str | None, num_shots: int) -> list[Problem]:
    """Read the first `num_shots` problems of a file.

    Raises:
        BenchmarkError: There are not so many.
    """
    if not num_shots or path is None:
        return []
    examples = read_problems(path, flag="--shots-file", limit=num_shots)
    if len(examples) < num_shots:
        raise BenchmarkError(
            f"--shots-file={path} has {len(examples)} problems, fewer than --num-shots={num_shots}."
        )
    return examples


def open_output(path: str | None) -> contextlib.AbstractContextManager[TextIO | None]:
    if path is None:
        return contextlib.nullcontext()
    try:
        return Path(path).open("w", encoding="utf-8")
    except OSError as error:
        raise BenchmarkError(f"--output={path} cannot be written: {error}") from error


async def ask_all(
    client: ServingClient,
    problems: Sequence[Problem],
    examples: Sequence[Problem],
    arguments: argparse.Namespace,
    output: TextIO | None,
) -> Evaluation:
    """Ask every problem; a cancellation (Ctrl-C) ends it early, with what there is."""
    evaluation = Evaluation()
    requests = [
        BenchRequest(
            prompt=make_prompt(problem.question, examples),
            prompt_len=None,
            output_len=arguments.max_tokens,
        )
        for problem in problems
    ]
    problem_of = {id(request): problem for request, problem in zip(requests, problems, strict=True)}
    bar = tqdm(total=len(requests), disable=arguments.disable_tqdm)

    def take(result: RequestResult) -> None:
        problem = problem_of[id(result.request)]
        number = final_number(result.text) if result.error is None else None
        outcome = Outcome(problem, result, number)
        evaluation.outcomes.append(outcome)
        if output is not None:
            print(json.dumps(describe(outcome), ensure_ascii=False), file=output, flush=True)
        num_right = sum(outcome.is_right for outcome in evaluation.outcomes)
        bar.set_postfix_str(f"{num_right} right", refresh=False)
        bar.update()

    start_s = time.perf_counter()
    try:
        await run_load(
            requests,
            client.send,
            times_s=[0.0] * len(requests),
            max_concurrency=arguments.concurrency,
            on_result=take,
        )
    except asyncio.CancelledError:
        evaluation.is_interrupted = True
    finally:
        evaluation.duration_s = time.perf_counter() - start_s
        bar.close()
    return evaluation


def show(
    evaluation: Evaluation, arguments: argparse.Namespace, model: str, num_problems: int
) -> int:
    """Print the table and warnings, write the figures, and return the exit status."""
    summary = summarise(evaluation.outcomes, evaluation.duration_s)
    headings = {
        "Model": model,
        "Data set": Path(arguments.dataset).name,
        "Examples before each question": arguments.num_shots,
    }
    print(format_table(summary, headings), flush=True)
    warnings = describe_failures([outcome.result for outcome in evaluation.outcomes])
    if evaluation.is_interrupted:
        warnings.append(f"interrupted: {len(evaluation.outcomes)} of {num_problems} were asked.")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if arguments.json:
        shown = {name: value for name, value in vars(arguments).items() if name != "api_key"}
        append_json(Path(arguments.json), summary, shown | {"model": model}, {})
    if evaluation.is_interrupted:
        return 130
    return 1 if summary["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
