"""GuideLLM: a short benchmark with synthetic prompts."""

import json
import os
import subprocess
import sys
from pathlib import Path

from checks import Checks, Server

check = Checks()
NUM_REQUESTS = 4
OUTPUT_LEN = 16
# An update that comes just as this runs out, by default after 0.1 s, is lost: then the last
# request is missing from the report.
POLL_INTERVAL = {"GUIDELLM__MP_POLL_INTERVAL": "2"}


@check
def a_short_benchmark(server: Server) -> float:
    backend = f"kind=openai_http,target={server.url.removesuffix('/v1')},model={server.model}"
    command = [
        *(str(Path(sys.executable).with_name("guidellm")), "run", "--backend", backend),
        *("--tokenizer", f"kind=hf_auto,model={server.tokenizer}"),
        *("--profile", "kind=concurrent,streams=2"),
        *("--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
        *("--data", f"kind=synthetic_text,prompt_tokens=64,output_tokens={OUTPUT_LEN}"),
        *("--output", "kind=json,path=report.json", "--disable-progress"),
    ]
    environment = os.environ | POLL_INTERVAL
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    (benchmark,) = json.loads(Path("report.json").read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    totals = metrics["request_totals"]
    assert (totals["successful"], totals["total"]) == (NUM_REQUESTS, NUM_REQUESTS), totals
    # As the server's usage says; GuideLLM asks for that many and no end before.
    lengths = metrics["output_token_count"]["successful"]
    assert lengths["min"] == lengths["max"] == OUTPUT_LEN, lengths
    return metrics["time_to_first_token_ms"]["successful"]["mean"]


if __name__ == "__main__":
    sys.exit(check.main())
