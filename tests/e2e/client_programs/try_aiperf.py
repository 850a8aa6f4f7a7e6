"""AIPerf: a short load of streamed chats, and one of completions."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from checks import Checks, Server

check = Checks()
NUM_REQUESTS = 6


def profile(server: Server, kind: str, *words: str) -> dict[str, Any]:
    command = [
        *(str(Path(sys.executable).with_name("aiperf")), "profile", "--model", server.model),
        *("--url", server.url.removesuffix("/v1"), "--endpoint-type", kind, "--streaming"),
        *("--tokenizer", server.tokenizer, "--request-count", str(NUM_REQUESTS)),
        *("--concurrency", "2", "--isl", "64", "--osl", "16", "--ui", "none"),
        *("--output-artifact-dir", kind, *words),
    ]
    # With this it takes a directory for a hub's name.
    environment = {name: os.environ[name] for name in os.environ if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    figures = json.loads(next(Path(kind).rglob("profile_export_aiperf.json")).read_text())
    assert figures["request_count"]["avg"] == NUM_REQUESTS, figures["request_count"]
    assert not (figures.get("error_request_count") or {}).get("avg")
    return figures


@check
def chats_are_streamed(server: Server) -> float:
    figures = profile(server, "chat", "--use-server-token-count")
    return figures["time_to_first_token"]["avg"]


@check
def completions_end_where_they_are_told(server: Server) -> float:
    figures = profile(server, "completions", "--extra-inputs", "ignore_eos:true")
    return figures["output_sequence_length"]["avg"]


if __name__ == "__main__":
    sys.exit(check.main())
