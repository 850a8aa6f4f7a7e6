"""What a cluster's head sees of it: living nodes, whether they have the code, and who is let in.

Run on the head, as a user would by `ray exec`; prints one line of JSON.

    python tests/e2e/cluster_probe.py NUM_NODES
"""

import json
import logging
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import ray

_DASHBOARD = "http://127.0.0.1:8265"
_PATIENCE_S = 150
_JOIN_WITHOUT_TOKEN = "import ray; ray.init(address='auto', logging_level='ERROR')"


def wait_for_nodes(count: int) -> dict[str, str]:
    """Ids of the living nodes by address, once there are so many or patience has ended."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while True:
        nodes = {
            node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]
        }
        if len(nodes) >= count or time.monotonic() > deadline_s:
            return nodes
        time.sleep(0.5)


@ray.remote(num_cpus=0.1)
def describe_node() -> dict[str, bool]:
    """Whether this node has its own copy of the code, and tells Serve of HAProxy."""
    checkout = Path.home() / "qwen-on-ray"
    return {
        "has_code": (checkout / "serve_app.py").is_file()
        and os.environ["PYTHONPATH"].startswith(str(checkout)),
        "has_haproxy": os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1",
    }


def ask_dashboard(token: str | None) -> int:
    request = urllib.request.Request(f"{_DASHBOARD}/api/jobs/")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def stranger_error() -> str:
    """What who joins without a token is told; empty if he is let in."""
    stranger = subprocess.run(
        [sys.executable, "-c", _JOIN_WITHOUT_TOKEN],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return stranger.stderr if stranger.returncode else ""


def main() -> None:
    ray.init(address="auto", logging_level=logging.ERROR)
    nodes = wait_for_nodes(int(sys.argv[1]))
    seen = {
        address: ray.get(
            describe_node.options(label_selector={"ray.io/node-id": node_id}).remote(), timeout=60
        )
        for address, node_id in nodes.items()
    }
    token = (Path.home() / ".ray" / "auth_token").read_text().strip()
    answers = {
        "none": ask_dashboard(None),
        "wrong": ask_dashboard("0" * len(token)),
        "right": ask_dashboard(token),
    }
    print(
        json.dumps({"nodes": seen, "dashboard": answers, "stranger": stranger_error()}), flush=True
    )


if __name__ == "__main__":
    main()
