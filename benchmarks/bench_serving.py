"""Measures a running server through its OpenAI API, with the flags and figures that SGLang's and
vLLM's `bench_serving` have.

    scripts/quickstart --port 30000 &
    python benchmarks/bench_serving.py --backend sgl-jax --dataset-name random --num-prompts 24 \\
        --random-input 512 --random-output 128 --max-concurrency 8 --random-range-ratio 1

Tokens are counted by the server's usage. Prompts are new each time, so that the prefix cache does
not flatter; without a tokenizer at hand they are token ids.
"""

import argparse
import asyncio
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.serving import plot, report
from benchmarks.serving.client import (
    RequestOptions,
    ServingClient,
    ask_profiler,
    find_model,
    flush_cache,
    open_session,
)
from benchmarks.serving.command_line import REFUSED, parse_arguments
from benchmarks.serving.datasets import DatasetOptions, make_requests
from benchmarks.serving.errors import BenchmarkError
from benchmarks.serving.flags import read_dataset_options
from benchmarks.serving.load import arrival_times, run_load
from benchmarks.serving.prompts import PromptMaker, find_tokenizer, find_vocab_size
from benchmarks.serving.results import BenchRequest, RequestResult

WARMUP_OUTPUT_LEN = 32


@dataclasses.dataclass(slots=True)
class Run:
    """What a benchmark measured so far."""

    results: list[RequestResult]
    duration_s: float = 0.0
    is_interrupted: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0; 1 if every request failed; 2 if nothing could be measured; 130 after Ctrl-C.
    """
    arguments = parse_arguments(argv, description=__doc__)
    try:
        if arguments.plot:
            plot.check_can_plot()
        return asyncio.run(benchmark(arguments))
    except BenchmarkError as error:
        print(f"bench_serving: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


async def benchmark(arguments: argparse.Namespace) -> int:
    """Prepare, measure and report; returns the exit status."""
    base_url = arguments.base_url or f"http://{arguments.host}:{arguments.port}"
    base_url = base_url.rstrip("/").removesuffix("/v1")
    async with open_session(
        api_key=arguments.api_key, timeout_s=arguments.timeout, headers=dict(arguments.header)
    ) as session:
        model, root = await find_model(
            session, base_url, arguments.served_model_name or arguments.model
        )
        dataset = read_dataset_options(arguments)
        is_chat = arguments.backend.endswith("-chat")
        rng = np.random.default_rng(dataset.seed)
        prompts = make_prompt_maker(
            dataset, arguments.tokenizer, [arguments.model, model, root], is_chat=is_chat, rng=rng
        )
        requests = make_requests(dataset, prompts, rng)
        options = RequestOptions(
            model=model,
            is_chat=is_chat,
            streams=not arguments.disable_stream,
            temperature=arguments.temperature,
            ignores_eos=not arguments.disable_ignore_eos,
            extra_body=arguments.extra_request_body,
            keeps_text=arguments.output_details,
        )
        client = ServingClient(session, base_url, options)
        await warm_up(client, arguments.warmup_requests, requests[0], prompts)
        if arguments.flush_cache:
            await flush_cache(session, base_url)
        if arguments.profile:
            await ask_profiler(session, base_url, "start")
        run = await measure(client, requests, arguments, rng)
        if arguments.profile:
            await ask_profiler(session, base_url, "stop")
    return show(run, arguments, model, len(requests))


def make_prompt_maker(
    dataset: DatasetOptions,
    tokenizer_name: str | None,
    models: Sequence[str | None],
    *,
    is_chat: bool,
    rng: np.random.Generator,
) -> PromptMaker | None:
    """Decide whether prompts are text or token ids; None where neither can be made.

    Args:
        models: Names of the model, which may be directories with a tokenizer.
    """
    tokenizer = find_tokenizer(tokenizer_name, *models)
    if is_chat and tokenizer is None:
        return None
    wants_ids = dataset.tokenize_prompt or dataset.dataset_name == "random-ids"
    return PromptMaker(
        rng,
        tokenizer=tokenizer,
        vocab_size=dataset.vocab_size or find_vocab_size(*models),
        wants_text=is_chat or (tokenizer is not None and not wants_ids),
        adds_special_tokens=not is_chat,
    )


async def warm_up(
    client: ServingClient, num_requests: int, like: BenchRequest, prompts: PromptMaker | None
) -> None:
    """Send requests like the first one, which is not used up: it would be found in the cache.

    Raises:
        BenchmarkError: All of them failed.
    """
    requests = []
    for _ in range(num_requests):
        request = dataclasses.replace(like, output_len=min(like.output_len, WARMUP_OUTPUT_LEN))
        if prompts is not None and like.prompt_len is not None:
            request = dataclasses.replace(request, prompt=prompts.make(like.prompt_len))
        requests.append(request)
    results = await asyncio.gather(*map(client.send, requests))
    if results and all(result.error is not None for result in results):
        raise BenchmarkError(f"the warm-up failed: {results[0].error}")


async def measure(
    client: ServingClient,
    requests: list[BenchRequest],
    arguments: argparse.Namespace,
    rng: np.random.Generator,
) -> Run:
    """Send all requests; a cancellation (Ctrl-C) ends it early, with what there is."""
    run = Run(results=[])
    bar = tqdm(total=len(requests), disable=arguments.disable_tqdm)

    def take(result: RequestResult) -> None:
        run.results.append(result)
        bar.update()

    times_s = arrival_times(
        len(requests),
        request_rate=arguments.request_rate,
        burstiness=arguments.burstiness,
        rng=rng,
    )
    start_s = time.perf_counter()
    try:
        await run_load(
            requests,
            client.send,
            times_s=times_s,
            max_concurrency=arguments.max_concurrency,
            on_result=take,
        )
    except asyncio.CancelledError:
        run.is_interrupted = True
    finally:
        run.duration_s = time.perf_counter() - start_s
        bar.close()
    return run


def show(run: Run, arguments: argparse.Namespace, model: str, num_requests: int) -> int:
    """Print the table and warnings, write the files, and return the exit status."""
    summary = report.summarise(run.results, run.duration_s)
    headings = {
        "Backend": arguments.backend,
        "Model": model,
        "Traffic request rate": arguments.request_rate,
        "Max request concurrency": arguments.max_concurrency or "not set",
    }
    print(report.format_table(summary, headings), flush=True)
    warnings = report.find_faults(
        run.results,
        has_exact_output=not arguments.disable_ignore_eos,
        has_exact_input=not arguments.backend.endswith("-chat"),
    )
    if run.is_interrupted:
        warnings.append(f"interrupted: {len(run.results)} of {num_requests} requests had ended.")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if arguments.output_file:
        details = report.request_details(run.results) if arguments.output_details else {}
        hidden = {"api_key", "header", *(flag[2:].replace("-", "_") for flag in REFUSED)}
        shown = {key: value for key, value in vars(arguments).items() if key not in hidden}
        report.append_json(Path(arguments.output_file), summary, shown | {"model": model}, details)
    if arguments.plot:
        plot.draw(run.results, Path(arguments.plot))
    if run.is_interrupted:
        return 130
    return 1 if summary["completed"] == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
