"""The whole evaluation against a real HTTP server whose answers are known."""

import asyncio
import json
from pathlib import Path

import pytest
from openai_server import Exchange, OpenAIServer

from benchmarks import eval_accuracy
from benchmarks.eval_accuracy import parse_arguments
from benchmarks.serving.accuracy import wilson_interval
from benchmarks.serving.errors import BenchmarkError
from benchmarks.serving.gsm8k import make_prompt, read_problems

TRAIN = [
    {"question": "One and two?", "answer": "1 + 2 = <<1+2=3>>3\n#### 3"},
    {"question": "Two thousand twice? ", "answer": "2000 * 2 = <<2000*2=4000>>4,000\n#### 4,000"},
]
TOKENS = 7


def write_lines(path: Path, rows: list[object]) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def train(tmp_path: Path) -> str:
    return write_lines(tmp_path / "train.jsonl", [*TRAIN])


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """Problem N asks for N * N; the empty line is none."""
    rows = [{"question": f"Square {n}?", "answer": f"{n} * {n}\n#### {n * n}"} for n in range(10)]
    return write_lines(tmp_path / "test.jsonl", [*rows[:4], "", *rows[4:]])


def asked_number(exchange: Exchange) -> int:
    (message,) = exchange.body["messages"]
    return int(message["content"].rpartition("Square ")[2].partition("?")[0])


async def send_answer(
    exchange: Exchange, text: str, *, reason: str = "stop", thoughts: str | None = None
) -> None:
    message = {"role": "assistant", "content": text, "reasoning_content": thoughts}
    choice = {"message": message, "finish_reason": reason}
    await exchange.send_json({"choices": [choice], "usage": exchange.usage(TOKENS)})


async def right_to_five(exchange: Exchange) -> None:
    """0 to 5 right, 6 and 7 wrong, 8 without a number, 9 cut and without a number of its own."""
    n = asked_number(exchange)
    if n <= 5:
        await send_answer(exchange, f"{n} times {n}. The answer is {n * n}.00")
    elif n <= 7:
        await send_answer(exchange, f"The answer is {n * n + 1}, not {n * n}")
    elif n == 8:
        await send_answer(exchange, "No idea.")
    else:
        await send_answer(exchange, "Let me", reason="length", thoughts="81 it could be")


async def evaluate(server: OpenAIServer, dataset: str, *flags: str) -> int:
    url = f"http://127.0.0.1:{server.port}"
    words = ["--url", url, "--dataset", dataset, "--disable-tqdm", *flags]
    return await eval_accuracy.evaluate(parse_arguments(words))


async def test_accuracy_is_that_of_the_answers(dataset, tmp_path, capsys):
    output, figures = tmp_path / "answers.jsonl", tmp_path / "figures.jsonl"
    async with OpenAIServer(answer=right_to_five) as server:
        flags = ["--num-shots=0", f"--output={output}", f"--json={figures}", "--api-key=secret"]
        assert await evaluate(server, dataset, *flags) == 0
    summary = json.loads(figures.read_text())
    assert (summary["answers"], summary["right"], summary["accuracy"]) == (10, 6, 0.6)
    assert (summary["without_number"], summary["cut"], summary["failed"]) == (2, 1, 0)
    assert summary["mean_output_tokens"] == TOKENS
    assert summary["output_throughput"] == pytest.approx(10 * TOKENS / summary["duration"])
    assert "secret" not in figures.read_text()
    table = capsys.readouterr().out
    for row in (
        "Model:                                   tiny",
        "Data set:                                test.jsonl",
        "Accuracy:                                0.600",
        "95 % interval:                           0.313 to 0.832",
        "Answers without a number:                2",
        "Answers cut by --max-tokens:             1",
        "Mean output tokens:                      7.00",
    ):
        assert row in table

    lines = {line["line"]: line for line in map(json.loads, output.read_text().splitlines())}
    assert sorted(lines) == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    seven = lines[9]
    assert (seven["question"], seven["prompt"]) == ("Square 7?", "Square 7?")
    assert (seven["extracted"], seven["expected"], seven["right"]) == ("50", "49", False)
    assert lines[4]["right"]
    cut = lines[11]
    assert (cut["extracted"], cut["finish_reason"]) == (None, "length")
    assert (cut["answer"], cut["thoughts"]) == ("Let me", "81 it could be")


async def test_what_is_sent(dataset, train):
    extra = '{"top_k": 1, "max_completion_tokens": null, "max_tokens": 9}'
    async with OpenAIServer(answer=right_to_five) as server:
        flags = ["--shots-file", train, "--num-shots=2", "--limit=1", "--model=other", "--seed=3"]
        await evaluate(server, dataset, *flags, "--max-tokens=64", "--temperature=0.5")
        await evaluate(server, dataset, "--num-shots=0", "--limit=1", "--extra-request-body", extra)
    few, zero = [exchange.body for exchange in server.exchanges]
    assert few == {
        "model": "other",
        "temperature": 0.5,
        "messages": [
            {
                "role": "user",
                "content": "Question: One and two?\nLet's think step by step\n1 + 2 = 3\n"
                "The answer is 3\n\n"
                "Question: Two thousand twice?\nLet's think step by step\n2000 * 2 = 4,000\n"
                "The answer is 4000\n\n"
                "Question: Square 0?\nLet's think step by step",
            }
        ],
        "max_completion_tokens": 64,
        "stream": False,
        "seed": 3,
        "stop": ["Question:"],
    }
    assert zero == {
        "model": "tiny",
        "temperature": 0.0,
        "messages": [{"role": "user", "content": "Square 0?"}],
        "max_completion_tokens": None,
        "max_tokens": 9,
        "stream": False,
        "top_k": 1,
    }


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
async def test_the_url_may_be_any_part_of_the_endpoints(dataset, suffix):
    async with OpenAIServer(answer=right_to_five) as server:
        url = f"http://127.0.0.1:{server.port}{suffix}"
        assert await evaluate(server, dataset, "--num-shots=0", "--limit=1", "--url", url) == 0
    assert [exchange.path for exchange in server.exchanges] == ["/v1/chat/completions"]


@pytest.mark.parametrize("limit", [8, 3])
async def test_as_many_are_asked_at_once_as_may_be(dataset, limit):
    together = asyncio.Barrier(limit)

    async def answer_together(exchange: Exchange) -> None:
        await together.wait()
        await right_to_five(exchange)

    async with OpenAIServer(answer=answer_together) as server:
        flags = ["--num-shots=0", f"--limit={10 // limit * limit}", f"--concurrency={limit}"]
        await evaluate(server, dataset, *flags, "--timeout=60")
    assert server.num_at_once == limit


async def test_failed_requests_are_told_and_leave_the_others_counted(dataset, tmp_path, capsys):
    async def fail_at_nine(exchange: Exchange) -> None:
        if asked_number(exchange) == 9:
            await exchange.send_json({"error": {"message": "it died"}}, 500)
        else:
            await right_to_five(exchange)

    output = tmp_path / "answers.jsonl"
    async with OpenAIServer(answer=fail_at_nine) as server:
        assert await evaluate(server, dataset, "--num-shots=0", f"--output={output}") == 1
    printed = capsys.readouterr()
    assert "Accuracy:                                0.667" in printed.out
    assert "Failed requests:                         1" in printed.out
    assert "1 of 10 requests failed:" in printed.err
    assert "1 x HTTP 500: it died" in printed.err
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["error"] for line in lines if line["error"]] == ["HTTP 500: it died"]


async def test_when_all_fail_there_is_no_accuracy(dataset, capsys):
    async def die(exchange: Exchange) -> None:
        await exchange.send_json({"error": {"message": "it died"}}, 500)

    async with OpenAIServer(answer=die) as server:
        assert await evaluate(server, dataset, "--num-shots=0") == 1
    assert "Accuracy:                                n/a" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        ("{", "line 3: no JSON"),
        ("[1]", "line 3: a list, and an object is needed"),
        ({"question": "Why?"}, "line 3: question and answer must both be texts.*has question"),
        ({"question": "Why?", "answer": 5}, "line 3: question and answer must both be texts"),
        ({"question": "Why?", "answer": "So 5."}, "line 3: .*no line such as #### 18.*'So 5.'"),
    ],
)
def test_a_faulty_line_is_named(tmp_path, faulty, message):
    path = write_lines(tmp_path / "faulty.jsonl", [TRAIN[0], "", faulty, TRAIN[1]])
    with pytest.raises(BenchmarkError, match=rf"--dataset=.*faulty\.jsonl, {message}"):
        read_problems(path, flag="--dataset")
    # What lies behind the limit is not read.
    assert len(read_problems(path, flag="--dataset", limit=1)) == 1


def test_files_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(BenchmarkError, match=r"--dataset=.*none cannot be read"):
        read_problems(str(tmp_path / "none"), flag="--dataset")
    empty = write_lines(tmp_path / "empty.jsonl", [])
    with pytest.raises(BenchmarkError, match=r"--shots-file=.*has no line with a problem"):
        read_problems(empty, flag="--shots-file")
    (tmp_path / "latin").write_bytes(b'{"question": "\xe4"}')
    with pytest.raises(BenchmarkError, match="latin cannot be read"):
        read_problems(str(tmp_path / "latin"), flag="--dataset")


def test_without_what_it_needs_the_status_is_two(dataset, train, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--dataset", dataset])
    assert ended.value.code == 2
    assert "--num-shots=4 needs --shots-file" in capsys.readouterr().err
    assert eval_accuracy.main(["--dataset", dataset, "--shots-file", train]) == 2
    assert "has 2 problems, fewer than --num-shots=4" in capsys.readouterr().err
    flags = ["--dataset", dataset, "--num-shots=0", "--url=http://127.0.0.1:1"]
    assert eval_accuracy.main(flags) == 2
    assert "--base-url" in capsys.readouterr().err


async def test_an_output_that_cannot_be_written_is_named(dataset, tmp_path):
    async with OpenAIServer(answer=right_to_five) as server:
        with pytest.raises(BenchmarkError, match=r"--output=.* cannot be written"):
            await evaluate(server, dataset, "--num-shots=0", f"--output={tmp_path}")
    assert not server.exchanges


def test_a_prompt_without_examples_is_the_question_alone():
    assert make_prompt("Why?", []) == "Why?"


@pytest.mark.parametrize(("num_right", "num_answers"), [(0, 5), (5, 5), (6, 10), (700, 1319)])
def test_the_interval_holds_the_shares_that_would_give_this_result_with_95_percent(
    num_right, num_answers
):
    """Wilson's bounds are where the normal test of a share just does not reject it."""
    bounds = wilson_interval(num_right, num_answers)
    observed = num_right / num_answers
    for bound in bounds:
        assert bound is not None
        if 0 < bound < 1:
            deviation = (bound * (1 - bound) / num_answers) ** 0.5
            assert abs(observed - bound) / deviation == pytest.approx(1.959964)
        else:
            assert bound == observed
    assert wilson_interval(0, 0) == (None, None)
