"""Measures the choice of engine against Serve's own on the same conversations: cache hits and TTFT.

    python benchmarks/bench_routing.py
    python benchmarks/bench_routing.py --engines 4 --rounds 3 --plot routing.png --json

Starts a Ray of its own with the demo model on this machine, served twice: by our choice of engine,
and by Serve's default, the shorter of two queues. Users hold conversations over one system prompt,
with pauses; each message comes with all that was said before it. The same trace is played in turn
to our choice, to our choice with the header `x-session-id`, and to the default; every time with a
salt of its own, so that nothing is cached of the time before.

Hit rate is cached prompt tokens ÷ prompt tokens, as the engines count them. A single conversation
finds all but its last message cached on the engine that had it before, and the system prompt alone,
if that, on any other.
"""

import argparse
import asyncio
import json
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from ray import serve
from ray.serve.config import RequestRouterConfig

import serve_app
from benchmarks.routing import plot
from benchmarks.routing.conversations import (
    Conversation,
    TraceOptions,
    Turn,
    hit_rate,
    hold,
    make_trace,
)
from benchmarks.serving.client import RequestOptions, ServingClient
from benchmarks.serving.plot import check_can_plot
from benchmarks.serving.prompts import PromptMaker
from benchmarks.streaming.client import HOST
from benchmarks.streaming.server import (
    ray_and_serve,
    server_beside,
    tell_port_and_wait,
)
from cluster.replica import Engine
from cluster.route_parts import SESSION_HEADER
from engine.config import parse_config
from engine.text.tokenizer import load_tokenizer
from scripts.demo_model import ensure_demo_model

MODEL = "routed"
RAY_CPUS = 16
READY_TIMEOUT_S = 400.0
REQUEST_TIMEOUT_S = 300.0
OURS, DEFAULT = "ours", "default"


@dataclass(slots=True)
class Policy:
    """A way to choose engines, and what came of it in each round.

    Attributes:
        application: Which of the two serves it; its name is its route prefix.
        session_header: Header that names the conversation, if any does.
    """

    name: str
    application: str
    session_header: str | None = None
    rounds: list[list[Turn]] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--conversations", type=int, default=12)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--system-len", type=int, default=256, help="tokens of the system prompt")
    parser.add_argument("--user-len", type=int, default=96, help="tokens of each message")
    parser.add_argument("--output-len", type=int, default=32, help="most tokens of each answer")
    parser.add_argument("--think-s", type=float, default=6.0, help="a user's mean pause")
    parser.add_argument(
        "--max-total-tokens", type=int, default=8192, help="that each engine's cache holds"
    )
    parser.add_argument("--rounds", type=int, default=2, help="times that each policy is measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="a checkpoint; default: the demo model")
    parser.add_argument("--json", action="store_true", help="one object per policy, not a table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG of the same")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    directory = arguments.model or ensure_demo_model()
    if arguments.serve:
        serve_until_stdin_ends(arguments, directory)
        return 0
    if arguments.plot:
        check_can_plot()
    policies = [
        Policy("ours", OURS),
        Policy("ours, session header", OURS, SESSION_HEADER),
        Policy("power of two choices", DEFAULT),
    ]
    # HAProxy's ports apart, Serve's own proxy costs the same for all three.
    with server_beside(__file__, {"RAY_SERVE_ENABLE_HA_PROXY": "0"}) as server:
        asyncio.run(measure(arguments, directory, server.port, policies))
    figures = [figures_of(policy) for policy in policies]
    print("\n".join(map(json.dumps, figures)) if arguments.json else table(figures), flush=True)
    if arguments.plot:
        plot.draw({policy.name: flat(policy) for policy in policies}, arguments.plot)
    return 1 if any(each["failed"] for each in figures) else 0


def serve_until_stdin_ends(arguments: argparse.Namespace, directory: Path) -> None:
    """Run Ray and Serve with the model served in both ways; tells the HTTP port."""
    config = parse_config(
        {
            "model_path": str(directory),
            "served_model_name": MODEL,
            "device": "cpu",
            "num_engines": arguments.engines,
            "max_total_tokens": arguments.max_total_tokens,
            "context_length": min(4096, arguments.max_total_tokens),
            "max_running_requests": 8,
            "chunked_prefill_size": 128,
            "hold_timeout_s": READY_TIMEOUT_S,
        }
    )
    fields = config.model_dump(exclude_unset=True)
    by_default = RequestRouterConfig.model_validate(
        {"request_router_class": "benchmarks.routing.power_of_two.PowerOfTwoChoices"}
    )
    ours = serve_app.engine_deployment(config, Engine)
    engines = {OURS: ours, DEFAULT: ours.options(request_router_config=by_default)}
    with ray_and_serve(num_cpus=RAY_CPUS) as port:
        for name, engine in engines.items():
            router = serve_app.router_deployment(config).bind(fields, engine.bind(fields))
            serve.run(router, name=name, route_prefix=f"/{name}")
        tell_port_and_wait(port)


async def measure(
    arguments: argparse.Namespace, directory: Path, port: int, policies: Sequence[Policy]
) -> None:
    """Play the trace to each policy, again and again."""
    options = TraceOptions(
        num_conversations=arguments.conversations,
        num_turns=arguments.turns,
        system_len=arguments.system_len,
        user_len=arguments.user_len,
        output_len=arguments.output_len,
        think_s=arguments.think_s,
        seed=arguments.seed,
    )
    prompts = PromptMaker(
        np.random.default_rng(arguments.seed),
        tokenizer=load_tokenizer(directory),
        vocab_size=0,
        wants_text=True,
    )
    trace = make_trace(options, prompts)
    async with aiohttp.ClientSession(
        headers={"Content-Type": "application/json"},
        timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
        connector=aiohttp.TCPConnector(limit=0),
    ) as session:
        for application in dict.fromkeys(policy.application for policy in policies):
            await wait_until_ready(session, url_of(port, application), arguments.engines)
        for number in range(arguments.rounds):
            for policy in policies:
                started_s = time.monotonic()
                policy.rounds.append(await play(trace, policy, session, port, options.output_len))
                print(
                    f"round {number + 1} of {arguments.rounds}, {policy.name}: "
                    f"{time.monotonic() - started_s:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )


async def play(
    trace: Sequence[Conversation],
    policy: Policy,
    session: aiohttp.ClientSession,
    port: int,
    output_len: int,
) -> list[Turn]:
    """Hold all conversations once, with nothing cached before."""
    options = RequestOptions(
        model=MODEL,
        is_chat=True,
        ignores_eos=False,
        extra_body={"cache_salt": secrets.token_hex(8)},
        keeps_text=True,
    )
    client = ServingClient(session, url_of(port, policy.application), options)
    return await hold(
        trace, client.send, output_len=output_len, session_header=policy.session_header
    )


def url_of(port: int, application: str) -> str:
    return f"http://{HOST}:{port}/{application}"


async def wait_until_ready(session: aiohttp.ClientSession, url: str, num_engines: int) -> None:
    async with asyncio.timeout(READY_TIMEOUT_S):
        while True:
            async with session.get(f"{url}/health/ready") as response:
                ranks = (await response.json())["ranks"]
            if [rank["state"] for rank in ranks] == ["ready"] * num_engines:
                return
            await asyncio.sleep(0.2)


def flat(policy: Policy) -> list[Turn]:
    return [turn for turns in policy.rounds for turn in turns]


def figures_of(policy: Policy) -> dict[str, Any]:
    """The figures of all rounds together, and each round's hit rate and median TTFT."""
    turns = flat(policy)
    return {
        "policy": policy.name,
        "requests": len(turns),
        "failed": sum(turn.result.error is not None for turn in turns),
        "prompt_tokens": sum(turn.result.prompt_len for turn in turns),
        "hit_rate": hit_rate(turns),
        "ttft_ms": {name: ttft_ms(turns, share) for name, share in (("p50", 50), ("p99", 99))},
        "rounds": [
            {"hit_rate": hit_rate(each), "ttft_p50_ms": ttft_ms(each, 50)} for each in policy.rounds
        ],
    }


def ttft_ms(turns: Sequence[Turn], percentile: int) -> float | None:
    times_s = [turn.result.ttft_s for turn in turns if turn.result.ttft_s is not None]
    return 1e3 * float(np.percentile(times_s, percentile)) if times_s else None


def table(figures: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| choice of engine | requests | failed | hit rate | by round | TTFT ms: median, p99 |",
        "|---|---|---|---|---|---|",
    ]
    for each in figures:
        rates = ", ".join(f"{one['hit_rate']:.0%}" for one in each["rounds"])
        times = [each["ttft_ms"][name] for name in ("p50", "p99")]
        shown = ", ".join("–" if time_ms is None else f"{time_ms:.0f}" for time_ms in times)
        lines.append(
            f"| {each['policy']} | {each['requests']} | {each['failed']} | "
            f"{each['hit_rate']:.1%} | {rates} | {shown} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
