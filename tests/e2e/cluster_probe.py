"""What a cluster's head sees of it: living nodes, whose code they run, and who is let in.

Run on the head, as a user would by `ray exec`; prints one line of JSON.

    python tests/e2e/cluster_probe.py NUM_NODES
"""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request

import ray

import serve_app

_DASHBOARD = "http://127.0.0.1:8265"
_PATIENCE_S = 150
_JOIN_WITHOUT_TOKEN = "import ray; ray.init(address='auto', logging_level='ERROR')"


def wait_for_nodes(count: int) -> list[str]:
    deadline_s = time.monotonic() + _PATIENCE_S
    while len(living := [node for node in ray.nodes() if node["Alive"]]) < count:
        if time.monotonic() > deadline_s:
            break
        time.sleep(0.5)
    return sorted(node["NodeManagerAddress"] for node in living)


@ray.remote(num_cpus=0.1)
def look_around() -> dict[str, str | None]:
    """Where this node has the code from, and what Serve's processes on it are told."""
    return {
        "code": serve_app.__file__,
        "has_haproxy": os.environ.get("RAY_SERVE_ENABLE_HA_PROXY"),
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


def main() -> None:
    ray.init(address="auto", logging_level="ERROR")
    addresses = wait_for_nodes(int(sys.argv[1]))
    on_each = {
        node["NodeManagerAddress"]: ray.get(
            look_around.options(label_selector={"ray.io/node-id": node["NodeID"]}).remote(),
            timeout=60,
        )
        for node in ray.nodes()
        if node["Alive"]
    }
    with open(os.path.expanduser("~/.ray/auth_token")) as file:
        token = file.read().strip()
    stranger = subprocess.run(
        [sys.executable, "-c", _JOIN_WITHOUT_TOKEN],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    print(
        json.dumps(
            {
                "addresses": addresses,
                "on_each": on_each,
                "dashboard_without_token": ask_dashboard(None),
                "dashboard_with_wrong_token": ask_dashboard("0" * len(token)),
                "dashboard_with_token": ask_dashboard(token),
                "stranger": stranger.returncode,
                "stranger_says": stranger.stderr[-1500:],
            }
        )
    )


if __name__ == "__main__":
    main()
