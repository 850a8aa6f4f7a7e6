import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "data" / "tiny-qwen2"
GOLDEN = json.loads((MODEL / "golden.json").read_text())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_processes_give_the_tokens_of_one():
    address = f"127.0.0.1:{free_port()}"
    root = HERE.parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(HERE)])}
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                str(HERE / "rank_process.py"),
                address,
                "2",
                str(rank),
                str(MODEL),
                json.dumps(GOLDEN["ids"]),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, (printed, errors) in zip(ranks, outputs, strict=True):
        assert process.returncode == 0, errors
        answer, num_compiles = printed.splitlines()[-2:]
        assert json.loads(answer)["tokens"] == GOLDEN["greedy"][:6]
        assert num_compiles == "0"
    assert outputs[0][0].splitlines()[-2:] == outputs[1][0].splitlines()[-2:]
