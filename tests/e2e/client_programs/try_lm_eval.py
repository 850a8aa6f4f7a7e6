"""lm-evaluation-harness: a task of answers over chats, and one of likelihoods over completions."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from checks import Checks, Server
from problems import write_problems

check = Checks()
LIMIT = 4


def evaluate(model: str, arguments: dict[str, Any], task: dict[str, Any], *words: str) -> Any:
    """Run a task whose file is JSON, which is YAML, too; returns its results."""
    Path(f"{task['task']}.yaml").write_text(json.dumps(task))
    pairs = ",".join(f"{name}={value}" for name, value in arguments.items())
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", model, "--model_args", pairs),
        *("--tasks", task["task"], "--include_path", ".", "--limit", str(LIMIT)),
        *("--output_path", task["task"], *words),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    (results,) = Path(task["task"]).rglob("results*.json")
    return json.loads(results.read_text())["results"][task["task"]]


@check
def word_problems_over_chats(server: Server) -> float:
    path = write_problems(Path("problems.jsonl"), range(2, 10)).resolve()
    task = {
        "task": "eggs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer.split('####')[-1].strip()}}",
        "generation_kwargs": {"until": ["Question:"], "do_sample": False, "max_gen_toks": 64},
        "filter_list": [
            {
                "name": "last",
                "filter": [
                    {"function": "regex", "regex_pattern": "(\\d+)", "group_select": -1},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match"}],
    }
    arguments = {
        "model": server.model,
        "base_url": f"{server.url}/chat/completions",
        "num_concurrent": 4,
    }
    results = evaluate("local-chat-completions", arguments, task, "--apply_chat_template")
    return results["exact_match,last"]


@check
def likelihoods_over_completions(server: Server) -> float:
    rows = [
        {"question": "The capital of France is", "choices": [" Paris", " dog"], "right": 0},
        {"question": "Monday, Tuesday,", "choices": [" Paris", " Wednesday"], "right": 1},
        {"question": "The opposite of hot is", "choices": [" cold", " Tuesday"], "right": 0},
        {"question": "One, two, three,", "choices": [" white", " four"], "right": 1},
    ]
    path = Path("choices.jsonl").resolve()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "facts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "right",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    arguments = {
        "model": server.model,
        "base_url": f"{server.url}/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": server.tokenizer,
        "num_concurrent": 2,
    }
    results = evaluate("local-completions", arguments, task)
    # So much the demo model knows.
    assert results["acc,none"] == 1, results
    return results["acc,none"]


if __name__ == "__main__":
    sys.exit(check.main())
