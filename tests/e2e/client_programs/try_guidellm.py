"""GuideLLM: a short benchmark with synthetic prompts."""

import json
import subprocess
import sys
from pathlib import Path

from checks import Checks, Server

check = Checks()
NUM_REQUESTS = 4


@check
def a_short_benchmark(server: Server) -> None:
    backend = f"kind=openai_http,target={server.url.removesuffix('/v1')},model={server.model}"
    command = [
        *(str(Path(sys.executable).with_name("guidellm")), "run", "--backend", backend),
        *("--tokenizer", f"kind=hf_auto,model={server.tokenizer}"),
        *("--profile", "kind=concurrent,streams=2"),
        *("--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
        *("--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16"),
        *("--output", "kind=json,path=report.json", "--disable-progress"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    (benchmark,) = json.loads(Path("report.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (NUM_REQUESTS, 0), totals


if __name__ == "__main__":
    sys.exit(check.main())
