"""The data sets: what is asked of the server, and in how many tokens.

All that is random comes from one seed. Files are local; nothing is downloaded.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.errors import BenchmarkError
from benchmarks.serving.prompts import PromptMaker
from benchmarks.serving.results import BenchRequest

DATASETS = ("random", "random-ids", "sharegpt", "generated-shared-prefix", "custom")
DEFAULT_CUSTOM_OUTPUT_LEN = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetOptions:
    """The flags of the same names."""

    dataset_name: str
    dataset_path: str | None
    num_prompts: int
    random_input_len: int
    random_output_len: int
    random_range_ratio: float
    sharegpt_output_len: int | None
    sharegpt_context_len: int | None
    gsp_num_groups: int
    gsp_prompts_per_group: int
    gsp_system_prompt_len: int
    gsp_question_len: int
    gsp_output_len: int
    gsp_range_ratio: float
    gsp_ordered: bool
    tokenize_prompt: bool
    vocab_size: int | None
    seed: int


def make_requests(
    options: DatasetOptions, prompts: PromptMaker | None, rng: np.random.Generator
) -> list[BenchRequest]:
    """Make the requests of a data set, in the order in which they are sent.

    Args:
        prompts: None where neither ids may be sent nor texts be made: a chat without tokenizer.

    Raises:
        BenchmarkError: The data set needs a file or a tokenizer that is not there.
    """
    match options.dataset_name:
        case "sharegpt":
            return _sharegpt_requests(options, prompts, rng)
        case "custom":
            return _custom_requests(options, prompts)
        case name if prompts is None:
            raise BenchmarkError(
                f"--dataset-name={name} with a chat backend needs a tokenizer, because a chat is "
                "text: say where it lies with --tokenizer, or use a backend without -chat."
            )
        case "generated-shared-prefix":
            return _shared_prefix_requests(options, prompts, rng)
        case _:
            return _random_requests(options, prompts, rng)


def draw_lens(
    max_len: int, range_ratio: float, size: int | tuple[int, ...], rng: np.random.Generator
) -> np.ndarray:
    """Draw lengths evenly from [max_len * range_ratio, max_len], at least 1."""
    return rng.integers(max(1, int(max_len * range_ratio)), max_len + 1, size=size)


def _random_requests(
    options: DatasetOptions, prompts: PromptMaker, rng: np.random.Generator
) -> list[BenchRequest]:
    size, ratio = options.num_prompts, options.random_range_ratio
    input_lens = draw_lens(options.random_input_len, ratio, size, rng).tolist()
    output_lens = draw_lens(options.random_output_len, ratio, size, rng).tolist()
    texts: list[str] = []
    if options.dataset_name == "random" and options.dataset_path is not None:
        texts = [turns[0] for turns in _read_conversations(options.dataset_path)]
        texts = [text for text in texts if text]
        rng.shuffle(texts)
    return [
        BenchRequest(
            prompt=prompts.repeat(texts[number % len(texts)], input_len)
            if texts
            else prompts.make(input_len),
            prompt_len=input_len,
            output_len=output_len,
        )
        for number, (input_len, output_len) in enumerate(zip(input_lens, output_lens, strict=True))
    ]


def _shared_prefix_requests(
    options: DatasetOptions, prompts: PromptMaker, rng: np.random.Generator
) -> list[BenchRequest]:
    groups, ratio = options.gsp_num_groups, options.gsp_range_ratio
    shape = (groups, options.gsp_prompts_per_group)
    system_lens = draw_lens(options.gsp_system_prompt_len, ratio, groups, rng).tolist()
    question_lens = draw_lens(options.gsp_question_len, ratio, shape, rng).tolist()
    output_lens = draw_lens(options.gsp_output_len, ratio, shape, rng).tolist()
    requests = []
    for group, system_len in enumerate(system_lens):
        system_prompt = prompts.draw(system_len)
        for question_len, output_len in zip(question_lens[group], output_lens[group], strict=True):
            prompt_len = system_len + question_len
            requests.append(
                BenchRequest(
                    prompt=prompts.make(prompt_len, system_prompt),
                    prompt_len=prompt_len,
                    output_len=output_len,
                )
            )
    if not options.gsp_ordered:
        order = rng.permutation(len(requests))
        requests = [requests[index] for index in order]
    return requests


def _sharegpt_requests(
    options: DatasetOptions, prompts: PromptMaker | None, rng: np.random.Generator
) -> list[BenchRequest]:
    """First question and answer of each conversation, in random order, as many as are wanted."""
    if options.dataset_path is None:
        raise BenchmarkError(
            "--dataset-name=sharegpt needs --dataset-path: a local copy of the file, such as "
            "ShareGPT_V3_unfiltered_cleaned_split.json. Nothing is downloaded."
        )
    conversations = list(_read_conversations(options.dataset_path))
    rng.shuffle(conversations)
    requests = []
    for question, answer in conversations:
        if len(requests) == options.num_prompts:
            break
        request = _text_request(question, answer, None, options, prompts)
        # As the field's benchmarks do: what is this short is noise.
        is_short = request.output_len < 2 or request.prompt_len in (0, 1)
        if not is_short and _fits(request, options.sharegpt_context_len):
            requests.append(request)
    return _not_empty(requests, options.dataset_path)


def _custom_requests(options: DatasetOptions, prompts: PromptMaker | None) -> list[BenchRequest]:
    """The file's rows in their order: `prompt` (text or token ids) or `conversations`."""
    if options.dataset_path is None:
        raise BenchmarkError(
            '--dataset-name=custom needs --dataset-path: JSON lines such as {"prompt": "…", '
            '"output_tokens": 128}.'
        )
    requests = []
    for row in _read_rows(options.dataset_path):
        prompt, turns = row.get("prompt"), _turns(row)
        asked = next((row[key] for key in ("output_tokens", "output_len") if key in row), None)
        if isinstance(prompt, list):
            output_len = options.sharegpt_output_len or asked or DEFAULT_CUSTOM_OUTPUT_LEN
            request = BenchRequest(prompt=prompt, prompt_len=len(prompt), output_len=output_len)
        elif isinstance(prompt, str):
            length = asked or DEFAULT_CUSTOM_OUTPUT_LEN
            request = _text_request(prompt, "", length, options, prompts)
        elif len(turns) >= 2:
            request = _text_request(turns[0], turns[1], asked, options, prompts)
        else:
            raise BenchmarkError(
                f"--dataset-path={options.dataset_path}: a row has neither a prompt (text or token "
                f"ids) nor conversations of two turns; it has {', '.join(row) or 'nothing'}."
            )
        if _fits(request, options.sharegpt_context_len):
            requests.append(request)
    return _not_empty(requests[: options.num_prompts], options.dataset_path)


def _text_request(
    prompt: str,
    answer: str,
    output_len: int | None,
    options: DatasetOptions,
    prompts: PromptMaker | None,
) -> BenchRequest:
    """A request of a text, its output as long as was asked for, else as the answer is."""
    output_len = options.sharegpt_output_len or output_len
    can_count = prompts is not None and prompts.can_encode
    if output_len is None:
        if prompts is None or not can_count:
            raise BenchmarkError(
                "without a tokenizer the answers in the file have no length: give --tokenizer, or "
                "--sharegpt-output-len."
            )
        output_len = prompts.count(answer)
    if prompts is None or not can_count:
        return BenchRequest(prompt=prompt, prompt_len=None, output_len=output_len)
    token_ids = prompts.encode(prompt)
    shown = token_ids if options.tokenize_prompt else prompt
    return BenchRequest(prompt=shown, prompt_len=len(token_ids), output_len=output_len)


def _fits(request: BenchRequest, context_len: int | None) -> bool:
    return context_len is None or (request.prompt_len or 0) + request.output_len <= context_len


def _not_empty(requests: list[BenchRequest], path: str) -> list[BenchRequest]:
    if not requests:
        raise BenchmarkError(f"--dataset-path={path} has no usable row.")
    return requests


def _read_conversations(path: str) -> Iterator[tuple[str, str]]:
    for row in _read_rows(path):
        turns = _turns(row)
        if len(turns) >= 2:
            yield turns[0], turns[1]


def _turns(row: dict[str, Any]) -> list[str]:
    turns = row.get("conversations") or row.get("conversation") or []
    return [str(turn.get("value") or turn.get("content") or "") for turn in turns]


def _read_rows(path: str) -> list[dict[str, Any]]:
    """Read a JSON list, or one JSON object per line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise BenchmarkError(
            f"--dataset-path={path} is no readable JSON list or JSON lines: {error}"
        ) from error
    if not all(isinstance(row, dict) for row in rows):
        raise BenchmarkError(f"--dataset-path={path}: every row must be a JSON object.")
    return rows
