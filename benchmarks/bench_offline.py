"""Measures the engine in this process, without HTTP and without Ray.

    python benchmarks/bench_offline.py --model-path DIRECTORY --dataset-name random \\
        --num-prompts 24 --random-input 512 --random-output 128 --random-range-ratio 1

hands all prompts to `LLM.generate` at once and reports throughput. With --max-concurrency (or
--request-rate) the requests go one by one to the `EngineCore` that LLM drives, so that TTFT, TPOT
and ITL can be told: the same figures as bench_serving's, less HTTP, router and Ray. Prompts are
token ids. Every flag of the engine (docs/flags.md) is taken too.
"""

import argparse
import asyncio
import dataclasses
import math
import sys
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.serving import plot, report
from benchmarks.serving.datasets import make_requests
from benchmarks.serving.errors import BenchmarkError
from benchmarks.serving.flags import (
    add_dataset_flags,
    add_load_flags,
    add_sampling_flags,
    check_result_flags,
    read_dataset_options,
)
from benchmarks.serving.load import arrival_times, run_load
from benchmarks.serving.prompts import PromptMaker, find_tokenizer, find_vocab_size
from benchmarks.serving.results import BenchRequest, RequestResult
from benchmarks.serving.timed_engine import TimedEngine
from cluster.cli import parse_command_line
from engine.config import EngineConfig
from engine.errors import QwenOnRayError
from engine.hub import resolve_checkpoint
from engine.llm import LLM
from engine.request import SamplingParams

WARMUP_OUTPUT_LEN = 8
HTTP_FLAGS = ("--host", "--port", "--api-key", "--api-key-file")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0, 1 if every request failed, 2 if none could be sent."""
    arguments, config = parse_arguments(argv)
    try:
        if arguments.plot:
            plot.check_can_plot()
        rng = np.random.default_rng(arguments.seed)
        requests = _make_requests(arguments, config, rng)
        if arguments.max_concurrency is None and arguments.request_rate == math.inf:
            results, duration_s = run_at_once(config, requests, arguments)
        else:
            results, duration_s = asyncio.run(run_one_by_one(config, requests, arguments, rng))
    except (BenchmarkError, QwenOnRayError) as error:
        print(f"bench_offline: {error}", file=sys.stderr)
        return 2
    summary = report.summarise(results, duration_s)
    headings = {
        "Model": config.model_path,
        "Traffic request rate": arguments.request_rate,
        "Max request concurrency": arguments.max_concurrency or "not set",
    }
    print(report.format_table(summary, headings))
    for warning in report.find_faults(
        results, has_exact_output=not arguments.disable_ignore_eos, has_exact_input=True
    ):
        print(f"warning: {warning}", file=sys.stderr)
    if arguments.output_file:
        details = report.request_details(results) if arguments.output_details else {}
        shown = vars(arguments) | config.model_dump(exclude_unset=True)
        report.append_json(Path(arguments.output_file), summary, shown, details)
    if arguments.plot:
        plot.draw(results, Path(arguments.plot))
    return 1 if summary["completed"] == 0 else 0


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, EngineConfig]:
    """Read the benchmark's flags, and leave the others to the engine's own parser."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_sampling_flags(parser)
    add_dataset_flags(parser)
    add_load_flags(parser)
    arguments, others = parser.parse_known_args(argv)
    for word in others:
        if word.partition("=")[0] in HTTP_FLAGS:
            parser.error(f"{word.partition('=')[0]}: there is no HTTP here.")
    check_result_flags(parser, arguments)
    return arguments, parse_command_line(others, prog=parser.prog).config


def run_at_once(
    config: EngineConfig, requests: Sequence[BenchRequest], arguments: argparse.Namespace
) -> tuple[list[RequestResult], float]:
    """Hand all prompts to `LLM.generate`; when single tokens came remains unknown."""
    with LLM(config, show_progress=not arguments.disable_tqdm) as llm:
        warmup = _warmup_request(requests[0])
        llm.generate([_token_ids(warmup)], _sampling(arguments, warmup.output_len))
        start_s = time.perf_counter()
        completions = llm.generate(
            [_token_ids(request) for request in requests],
            [_sampling(arguments, request.output_len) for request in requests],
        )
        duration_s = time.perf_counter() - start_s
    results = [
        RequestResult(
            request=request,
            start_s=start_s,
            latency_s=duration_s,
            prompt_len=len(completion.prompt_token_ids),
            output_len=len(completion.token_ids),
            num_cached_tokens=completion.num_cached_tokens,
        )
        for request, completion in zip(requests, completions, strict=True)
    ]
    return results, duration_s


async def run_one_by_one(
    config: EngineConfig,
    requests: Sequence[BenchRequest],
    arguments: argparse.Namespace,
    rng: np.random.Generator,
) -> tuple[list[RequestResult], float]:
    """Send each request to an engine at its time, and note when its tokens come."""
    engine = TimedEngine(
        config,
        temperature=arguments.temperature,
        ignores_eos=not arguments.disable_ignore_eos,
    )
    results: list[RequestResult] = []
    bar = tqdm(total=len(requests), disable=arguments.disable_tqdm)

    def take(result: RequestResult) -> None:
        results.append(result)
        bar.update()

    await engine.start()
    running = asyncio.create_task(engine.run())
    try:
        await _while_running(running, engine.send(_warmup_request(requests[0])))
        times_s = arrival_times(
            len(requests),
            request_rate=arguments.request_rate,
            burstiness=arguments.burstiness,
            rng=rng,
        )
        load = run_load(
            requests,
            engine.send,
            times_s=times_s,
            max_concurrency=arguments.max_concurrency,
            on_result=take,
        )
        start_s = time.perf_counter()
        await _while_running(running, load)
        return results, time.perf_counter() - start_s
    finally:
        bar.close()
        running.cancel()
        await engine.stop()


async def _while_running(running: asyncio.Task[None], work: Coroutine[Any, Any, object]) -> None:
    """Wait for `work`, but not for ever if the engine dies."""
    task = asyncio.create_task(work)
    await asyncio.wait({task, running}, return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        task.cancel()
        running.result()
    await task


def _warmup_request(like: BenchRequest) -> BenchRequest:
    """The prompt backwards, so that the prefix cache does not know the first request."""
    return dataclasses.replace(
        like,
        prompt=_token_ids(like)[::-1],
        output_len=min(like.output_len, WARMUP_OUTPUT_LEN),
    )


def _make_requests(
    arguments: argparse.Namespace, config: EngineConfig, rng: np.random.Generator
) -> list[BenchRequest]:
    options = read_dataset_options(arguments)
    directory = resolve_checkpoint(
        config.model_path, revision=config.revision, download_dir=config.download_dir
    )
    prompts = PromptMaker(
        rng,
        tokenizer=find_tokenizer(config.tokenizer_path, str(directory)),
        vocab_size=options.vocab_size or find_vocab_size(str(directory)),
        wants_text=False,
        adds_special_tokens=True,
    )
    requests = make_requests(options, prompts, rng)
    for number, request in enumerate(requests):
        if isinstance(request.prompt, str):
            prompt = prompts.encode(request.prompt)
            requests[number] = dataclasses.replace(request, prompt=prompt)
    return requests


def _token_ids(request: BenchRequest) -> list[int]:
    assert isinstance(request.prompt, list)
    return request.prompt


def _sampling(arguments: argparse.Namespace, output_len: int) -> SamplingParams:
    return SamplingParams(
        temperature=arguments.temperature,
        ignore_eos=not arguments.disable_ignore_eos,
        max_tokens=output_len,
    )


if __name__ == "__main__":
    sys.exit(main())
