"""The command line of the serving benchmark: every flag does something or says why it cannot."""

import argparse
import math
from collections.abc import Sequence

from benchmarks.serving.client import BACKENDS
from benchmarks.serving.flags import (
    add_dataset_flags,
    add_load_flags,
    add_sampling_flags,
    check_result_flags,
    json_object,
    positive_float,
)

# Flags of the benchmarks that this one follows, and why they are not here.
REFUSED = {
    "--lora-name": "name the adapter as --model, if the server has one.",
    "--apply-chat-template": "the server does that: use a backend ending in -chat.",
    "--return-logprob": "ask for them with --extra-request-body '{\"logprobs\": 1}'.",
    "--plot-throughput": "use --plot FILE.png.",
    "--pd-separated": "prefill and decode are not separate here.",
}


def parse_arguments(
    argv: Sequence[str] | None = None, *, description: str | None = None
) -> argparse.Namespace:
    """Read the flags.

    Raises:
        SystemExit: With status 2 and a message on stderr for flags that cannot work.
    """
    parser = make_parser(description)
    arguments = parser.parse_args(argv)
    for flag, reason in REFUSED.items():
        if getattr(arguments, flag[2:].replace("-", "_")) is not None:
            parser.error(f"{flag}: {reason}")
    if arguments.backend not in BACKENDS:
        parser.error(f"unknown --backend={arguments.backend}. Known: {', '.join(BACKENDS)}.")
    if arguments.burstiness != 1.0 and arguments.request_rate == math.inf:
        parser.error("--burstiness needs --request-rate: without it all requests start at once.")
    if arguments.tokenize_prompt and arguments.backend.endswith("-chat"):
        parser.error("--tokenize-prompt: a chat takes text; use a backend without -chat.")
    check_result_flags(parser, arguments)
    return arguments


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("server")
    group.add_argument(
        "--backend",
        default="sgl-jax",
        help="all are spoken to as OpenAI is, those ending in -chat at /v1/chat/completions, the "
        f"others at /v1/completions: {', '.join(BACKENDS)}; default: sgl-jax",
    )
    group.add_argument("--base-url", metavar="URL", help="in place of --host and --port")
    group.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    group.add_argument("--port", type=int, default=30000, help="default: 30000")
    group.add_argument(
        "--model", help="name or directory; default: the first that /v1/models lists"
    )
    group.add_argument(
        "--served-model-name", metavar="NAME", help="what the server calls it; default: --model"
    )
    group.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="directory or hub name; default: the model's, where it is a local directory; without "
        "any, prompts are token ids",
    )
    group.add_argument("--api-key", metavar="KEY", help="default: OPENAI_API_KEY")
    group.add_argument(
        "--header", nargs="+", type=_header, default=[], metavar="KEY=VALUE", help="HTTP headers"
    )
    group.add_argument(
        "--timeout",
        type=positive_float,
        default=6 * 3600.0,
        metavar="SECONDS",
        help="a request that takes longer has failed; default: 21600",
    )
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--disable-stream", action="store_true", help="whole answers: no TTFT, TPOT and ITL"
    )
    group.add_argument(
        "--extra-request-body",
        type=json_object,
        default={},
        metavar="JSON",
        help="an object whose keys go into every request",
    )
    group.add_argument(
        "--warmup-requests",
        type=int,
        default=1,
        metavar="N",
        help="sent before, with prompts of their own, and not counted; default: 1",
    )
    group.add_argument(
        "--profile",
        action="store_true",
        help="have the server write a trace meanwhile: /start_profile before, /stop_profile after",
    )
    group.add_argument(
        "--flush-cache", action="store_true", help="empty the server's prefix cache before"
    )
    for flag in REFUSED:
        parser.add_argument(flag, nargs="*", help=argparse.SUPPRESS)
    add_sampling_flags(parser)
    add_dataset_flags(parser)
    add_load_flags(parser)
    return parser


def _header(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text} is not KEY=VALUE")
    return key, value
