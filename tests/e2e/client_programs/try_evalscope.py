"""evalscope's two commands: an evaluation on a local copy of gsm8k's format, and a load test."""

import json
import subprocess
import sys
from pathlib import Path

from checks import Checks, Server
from problems import write_gsm8k

check = Checks()
LIMIT = 4


def run(*words: str) -> str:
    command = [str(Path(sys.executable).with_name("evalscope")), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return done.stdout + done.stderr


@check
def gsm8k_is_evaluated_by_all_its_problems(server: Server) -> None:
    folder = write_gsm8k(Path("gsm8k"), LIMIT)
    arguments = {"gsm8k": {"local_path": str(folder), "subset_list": ["default"]}}
    run(
        *("eval", "--model", server.model, "--api-url", f"{server.url}/chat/completions"),
        *("--api-key", "EMPTY", "--eval-type", "openai_api", "--datasets", "gsm8k"),
        *("--eval-batch-size", "8", "--limit", str(LIMIT), "--work-dir", "outputs"),
        *("--dataset-args", json.dumps(arguments), "--generation-config", '{"max_tokens": 200}'),
    )
    assert list(Path("outputs").rglob("reports/**/gsm8k.json"))
    (predictions,) = Path("outputs").rglob("predictions/**/*.jsonl")
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert {line["index"] for line in lines} == set(range(LIMIT))
    for output in (line["model_output"] for line in lines):
        assert output["error"] is None
        assert output["choices"][0]["message"]["content"]


@check
def a_load_test_of_random_prompts(server: Server) -> None:
    run(
        *("perf", "--model", server.model, "--url", f"{server.url}/chat/completions"),
        *("--api", "openai", "--api-key", "EMPTY", "--dataset", "random"),
        *("--tokenizer-path", server.tokenizer, "--number", str(LIMIT), "--parallel", "2"),
        *("--min-prompt-length", "32", "--max-prompt-length", "64", "--max-tokens", "16"),
        *("--min-tokens", "16", "--stream", "--outputs-dir", "perf"),
    )
    (summary,) = Path("perf").rglob("benchmark_summary.json")
    figures = json.loads(summary.read_text())
    assert (figures["Success Requests"], figures["Failed Requests"]) == (LIMIT, 0), figures


if __name__ == "__main__":
    sys.exit(check.main())
