"""The guide's evaluation as the guide writes it: the last evalscope whose --eval-type has service.

Without a hub, gsm8k's file is local; few tokens are asked for, since the demo model may never end.
"""

import json
import subprocess
import sys
from pathlib import Path

from checks import Checks, Server
from problems import write_gsm8k

check = Checks()
LIMIT = 4


@check
def gsm8k_is_evaluated_by_the_guides_command(server: Server) -> float:
    folder = write_gsm8k(Path("gsm8k"), LIMIT)
    arguments = json.dumps({"gsm8k": {"local_path": str(folder)}})
    command = [
        *(str(Path(sys.executable).with_name("evalscope")), "eval", "--model", server.model),
        *("--api-url", f"{server.url}/chat/completions", "--api-key", "EMPTY"),
        *("--eval-type", "service", "--datasets", "gsm8k", "--eval-batch-size", "8"),
        *("--limit", str(LIMIT), "--dataset-args", arguments),
        *("--generation-config", '{"max_tokens": 200, "temperature": 0}'),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    (predictions,) = Path("outputs").rglob("predictions/**/*.jsonl")
    answers = [json.loads(line) for line in predictions.read_text().splitlines()]
    questions = {answer["raw_input"]["question"] for answer in answers}
    assert len(questions) == LIMIT
    assert all(answer["choices"][0]["message"]["content"] for answer in answers)
    (report,) = Path("outputs").rglob("reports/**/gsm8k.json")
    (metric,) = json.loads(report.read_text())["metrics"]
    assert metric["num"] == LIMIT
    return metric["score"]


if __name__ == "__main__":
    sys.exit(check.main())
