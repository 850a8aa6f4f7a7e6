"""The offline benchmark: exact token counts, both at once and timed, and the engine's own flags."""

import json
from pathlib import Path

import pytest

from benchmarks import bench_offline

DATA = Path(__file__).parents[1] / "data"
ENGINE = (
    f"--model-path {DATA / 'tiny-qwen2'} --device cpu --dtype float32 --context-length 256 "
    "--max-total-tokens 2048 --max-running-requests 4 --chunked-prefill-size 32"
)
LOAD = "--num-prompts 6 --random-input 40 --random-output 6 --random-range-ratio 1 --disable-tqdm"


def run(flags: str, path: Path) -> dict:
    words = f"{ENGINE} {LOAD} {flags} --output-details --output-file {path}".split()
    assert bench_offline.main(words) == 0
    return json.loads(path.read_text())


def test_all_at_once_gives_throughput(tmp_path, capsys):
    line = run("", tmp_path / "out.jsonl")
    assert line["input_lens"] == [40] * 6
    assert line["output_lens"] == [6] * 6
    assert line["total_cached_tokens"] == 0
    output = capsys.readouterr()
    assert "Total generated tokens:                  36" in output.out
    assert "Mean TTFT (ms):                          n/a" in output.out
    assert "warning" not in output.err


def test_with_a_limit_every_token_is_timed(tmp_path):
    line = run("--max-concurrency 2", tmp_path / "out.jsonl")
    assert line["input_lens"] == [40] * 6
    assert line["output_lens"] == [6] * 6
    assert line["total_cached_tokens"] == 0
    assert all(ttft > 0 for ttft in line["ttfts"])
    assert [len(samples) for samples in line["itls"]] == [5] * 6
    assert line["concurrency"] <= 2


def test_requests_that_can_never_run_are_counted(capsys):
    flags = f"{ENGINE} {LOAD} --max-concurrency 2 --random-input 300"
    assert bench_offline.main(flags.split()) == 1
    assert "6 of 6 requests failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (f"{ENGINE} --port 1", "--port: there is no HTTP here"),
        (f"{ENGINE} --tp-sze 2", "--tp-size"),
        ("--num-prompts 3", "--model-path"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        bench_offline.main(flags.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
