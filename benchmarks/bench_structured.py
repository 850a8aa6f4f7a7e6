"""Measures what it costs that answers have to follow a grammar, in the time per token.

    python benchmarks/bench_structured.py
    python benchmarks/bench_structured.py --concurrency 8 --rounds 5 --json

Runs the engine in this process on the shape of Qwen3-0.6B with random weights and Qwen's own
vocabulary (a checkpoint is written once, below --checkpoint). In each round the same prompts are
answered in turn by free text, by prose inside a JSON string, where each token has a choice of
thousands and nothing is certain, and by an array of records, of which much is. All answers have as
many tokens. TPOT is the time from an answer's first token to its last over the tokens between; the
figures are ratios to free text within a round.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.random_checkpoint import write_checkpoint
from engine.config import EngineConfig
from engine.grammar import Grammar, json_schema_source
from engine.llm import LLM
from engine.request import SamplingParams

PROMPT_LEN = 64
# Longer than any answer that is measured.
PROSE = {
    "type": "object",
    "properties": {"text": {"type": "string", "minLength": 8000}},
    "required": ["text"],
    "additionalProperties": False,
}
RECORD = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 12},
        "year_of_birth": {"type": "integer", "minimum": 1900, "maximum": 2026},
        "department": {"enum": ["engineering", "operations", "sales"]},
        "is_active": {"type": "boolean"},
    },
    "required": ["first_name", "year_of_birth", "department", "is_active"],
    "additionalProperties": False,
}
RECORDS = {"type": "array", "items": RECORD, "minItems": 200}


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one set of answers: milliseconds a token, and steps a token of an answer."""

    tpot_ms: float
    steps_per_token: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concurrency", type=int, default=8, help="answers at a time")
    parser.add_argument("--output-len", type=int, default=96, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=4, help="of all three kinds")
    parser.add_argument(
        "--disable-overlap-schedule",
        action="store_true",
        help="plan each step only when the tokens before it are known",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=Path(tempfile.gettempdir()) / "qwen3-0.6b-random",
        help="where the checkpoint is, or is to be written (1.2 GB)",
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    arguments = parser.parse_args(argv)
    rounds = run(arguments)
    if arguments.json:
        print(json.dumps([{kind: asdict(one) for kind, one in each.items()} for each in rounds]))
    else:
        print(format_table(rounds))
    return 0


def run(arguments: argparse.Namespace) -> list[dict[str, Figures]]:
    """Answer the prompts in each way, `rounds` times."""
    grammars = {
        "free text": None,
        "prose in a string": Grammar(json_schema_source(PROSE, param="schema")),
        "records": Grammar(json_schema_source(RECORDS, param="schema")),
    }
    config = EngineConfig(
        model_path=str(write_checkpoint(arguments.checkpoint)),
        dtype="bfloat16",
        max_running_requests=arguments.concurrency,
        context_length=PROMPT_LEN + arguments.output_len + 32,
        chunked_prefill_size=512,
        # Prompts are the same in all rounds.
        enable_prefix_caching=False,
        disable_overlap_schedule=arguments.disable_overlap_schedule,
    )
    numbers = np.random.default_rng(0)
    prompts = numbers.integers(0, 100_000, (arguments.concurrency, PROMPT_LEN)).tolist()
    with LLM(config, show_progress=not arguments.json) as llm:
        for grammar in grammars.values():
            measure(llm, prompts, 4, grammar)
        return [
            {
                kind: measure(llm, prompts, arguments.output_len, grammar)
                for kind, grammar in grammars.items()
            }
            for _ in range(arguments.rounds)
        ]


def measure(
    llm: LLM, prompts: Sequence[Sequence[int]], output_len: int, grammar: Grammar | None
) -> Figures:
    """Answer all prompts at once.

    Raises:
        RuntimeError: An answer is not as long as it is to be.
    """
    stats = llm.core.stats
    before = stats.time_per_output_token_s.total, stats.steps_total
    params = [
        # Likely tokens only, as of a trained model: else half of them would be rare bytes.
        SamplingParams(
            temperature=1, top_k=50, seed=seed, max_tokens=output_len, ignore_eos=grammar is None
        )
        for seed in range(len(prompts))
    ]
    completions = llm.generate(prompts, params, grammar=grammar)
    if any(len(completion.token_ids) != output_len for completion in completions):
        raise RuntimeError("an answer ended early")
    tpot_s = (stats.time_per_output_token_s.total - before[0]) / len(prompts)
    num_steps = stats.steps_total - before[1]
    return Figures(tpot_ms=tpot_s * 1e3, steps_per_token=num_steps / output_len)


def format_table(rounds: Sequence[dict[str, Figures]]) -> str:
    """A row for each kind of answer; medians over the rounds, ratios within them."""
    lines = [
        "| answers | TPOT ms | TPOT ÷ free text: median, lowest, highest | steps a token |",
        "|---|---|---|---|",
    ]
    for kind in rounds[0]:
        ratios = [each[kind].tpot_ms / each["free text"].tpot_ms for each in rounds]
        tpot_ms = statistics.median(each[kind].tpot_ms for each in rounds)
        steps = statistics.median(each[kind].steps_per_token for each in rounds)
        spread = f"{statistics.median(ratios):.3f}, {min(ratios):.3f}, {max(ratios):.3f}"
        lines.append(f"| {kind} | {tpot_ms:.1f} | {spread} | {steps:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
