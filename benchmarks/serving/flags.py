"""Flags that the serving and the offline benchmark share."""

import argparse
import dataclasses
import json
import math
from typing import Any

from benchmarks.serving.datasets import DATASETS, DatasetOptions


def add_dataset_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `DatasetOptions` to a parser."""
    group = parser.add_argument_group("data set")
    group.add_argument("--dataset-name", choices=DATASETS, default="random")
    group.add_argument(
        "--dataset-path",
        metavar="FILE",
        help="JSON or JSON lines: conversations for sharegpt, prompts for custom; with random, "
        "conversations whose texts are repeated or cut to length",
    )
    group.add_argument(
        "--num-prompts", "--num-prompt", type=positive_int, default=1000, metavar="N"
    )
    group.add_argument(
        "--random-input-len", "--random-input", type=positive_int, default=1024, metavar="TOKENS"
    )
    group.add_argument(
        "--random-output-len", "--random-output", type=positive_int, default=1024, metavar="TOKENS"
    )
    group.add_argument(
        "--random-range-ratio",
        type=ratio,
        default=0.0,
        metavar="RATIO",
        help="lengths are drawn evenly from [length * RATIO, length], as SGLang means it; 1 makes "
        "all lengths equal; default: 0",
    )
    group.add_argument(
        "--sharegpt-output-len",
        "--custom-output-len",
        type=positive_int,
        metavar="TOKENS",
        help="for sharegpt and custom, in place of the lengths in the file",
    )
    group.add_argument(
        "--sharegpt-context-len",
        type=positive_int,
        metavar="TOKENS",
        help="leave out conversations that are longer, prompt and output together",
    )
    group.add_argument("--gsp-num-groups", type=positive_int, default=64, metavar="N")
    group.add_argument(
        "--gsp-prompts-per-group",
        type=positive_int,
        default=16,
        metavar="N",
        help="generated-shared-prefix sends so many prompts for each of its groups, whatever "
        "--num-prompts is; those of a group begin with the same system prompt",
    )
    group.add_argument("--gsp-system-prompt-len", type=positive_int, default=2048, metavar="TOKENS")
    group.add_argument("--gsp-question-len", type=positive_int, default=128, metavar="TOKENS")
    group.add_argument("--gsp-output-len", type=positive_int, default=256, metavar="TOKENS")
    group.add_argument("--gsp-range-ratio", type=ratio, default=1.0, metavar="RATIO")
    group.add_argument("--gsp-ordered", action="store_true", help="send group after group")
    group.add_argument(
        "--tokenize-prompt", action="store_true", help="send token ids even with a tokenizer"
    )
    group.add_argument(
        "--vocab-size",
        type=positive_int,
        metavar="N",
        help="random ids are below it; default: the tokenizer's, else a local model's, else 32000",
    )
    group.add_argument("--seed", type=int, default=1)


def read_dataset_options(arguments: argparse.Namespace) -> DatasetOptions:
    """Pick the data set's flags out of all."""
    names = [field.name for field in dataclasses.fields(DatasetOptions)]
    return DatasetOptions(**{name: getattr(arguments, name) for name in names})


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def ratio(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not within 0 and 1")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} is no JSON object")
    return value


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how answers are sampled, and when they end."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=0.0, help="default: 0")
    group.add_argument("--disable-ignore-eos", action="store_true", help="let end tokens end")


def add_load_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say when requests are sent and where the figures go."""
    group = parser.add_argument_group("load")
    group.add_argument(
        "--request-rate",
        type=positive_float,
        default=math.inf,
        metavar="PER_SECOND",
        help="average of a Poisson process; default: inf, all at once",
    )
    group.add_argument(
        "--burstiness",
        type=positive_float,
        default=1.0,
        help="with --request-rate: 1 is Poisson, smaller sends in bursts, larger more evenly",
    )
    group.add_argument(
        "--max-concurrency",
        type=positive_int,
        metavar="N",
        help="requests under way at once; default: no limit",
    )
    group = parser.add_argument_group("results")
    group.add_argument("--output-file", metavar="FILE", help="append one line of JSON to it")
    group.add_argument(
        "--output-details", action="store_true", help="put every request's figures into that line"
    )
    group.add_argument("--tag", help="goes into that line")
    group.add_argument(
        "--plot", metavar="FILE.png", help="draw latencies and throughput; needs matplotlib"
    )
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def check_result_flags(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with a message for flags of `add_load_flags` that do nothing without another."""
    if arguments.output_details and not arguments.output_file:
        parser.error("--output-details needs --output-file, where the details go.")
