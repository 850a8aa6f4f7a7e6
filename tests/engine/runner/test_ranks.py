import json
import os
import re
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


def run_ranks(num_ranks: int, programs: Path) -> list[tuple[str, str]]:
    """Standard output and error of each rank."""
    address = f"127.0.0.1:{free_port()}"
    root = HERE.parents[2]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), str(HERE)]),
        "JAX_COMPILATION_CACHE_DIR": str(programs),
    }
    command = [sys.executable, str(HERE / "rank_process.py"), address, str(num_ranks)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(MODEL), json.dumps(GOLDEN["ids"])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, (_, errors) in zip(ranks, outputs, strict=True):
        assert process.returncode == 0, errors
    return outputs


@pytest.mark.slow
def test_two_processes_give_the_tokens_of_one_and_compile_once_for_all_starts(tmp_path):
    for start in range(2):
        answers = []
        for printed, logged in run_ranks(2, tmp_path):
            answer, num_compiles = printed.splitlines()[-2:]
            assert json.loads(answer)["tokens"] == GOLDEN["greedy"][:6]
            assert num_compiles == "0"
            answers.append(answer)
            counts = re.findall(r"(\d+) programs compiled, (\d+) found compiled", logged)
            compiled, found = (sum(map(int, column)) for column in zip(*counts, strict=True))
            assert (compiled == 0, found == 0) == (start == 1, start == 0)
        assert answers[0] == answers[1]
