"""The whole benchmark against a real HTTP server: what it sends, counts, prints and returns."""

import asyncio
import json
import signal
import sys
from pathlib import Path

import pytest
from openai_server import Exchange, OpenAIServer, one_token_per_event
from tiny_tokenizer import write_tiny_tokenizer

from benchmarks import bench_serving
from benchmarks.serving.client import BACKENDS
from benchmarks.serving.command_line import REFUSED, parse_arguments
from benchmarks.serving.errors import BenchmarkError

SEEDS_COMMAND = (
    "--backend sgl-jax --dataset-name random --num-prompts 24 --random-input 512 "
    "--random-output 128 --max-concurrency 8 --random-range-ratio 1 --warmup-requests 0"
)
SMALL = (
    "--num-prompts 6 --random-input 8 --random-output 5 --random-range-ratio 1 --disable-tqdm "
    "--warmup-requests 0"
)


async def bench(server: OpenAIServer, flags: str, *more: str) -> int:
    """Run the benchmark against `server`; the later flags win."""
    words = [*SMALL.split(), "--port", str(server.port), *flags.split(), *more]
    return await bench_serving.benchmark(parse_arguments(words))


def test_the_seeds_command_means_what_it_says():
    arguments = parse_arguments(SEEDS_COMMAND.split())
    assert (arguments.backend, arguments.dataset_name) == ("sgl-jax", "random")
    assert (arguments.num_prompts, arguments.max_concurrency) == (24, 8)
    assert (arguments.random_input_len, arguments.random_output_len) == (512, 128)
    assert (arguments.random_range_ratio, arguments.warmup_requests) == (1.0, 0)
    assert (arguments.host, arguments.port) == ("127.0.0.1", 30000)


async def test_the_seeds_command_sends_what_it_says(capsys):
    eight = asyncio.Barrier(8)

    async def answer_eight_at_once(exchange: Exchange) -> None:
        await eight.wait()
        await one_token_per_event(exchange)

    async with OpenAIServer(answer=answer_eight_at_once) as server:
        assert await bench(server, SEEDS_COMMAND) == 0
    assert server.num_at_once == 8
    prompts = [exchange.body.pop("prompt") for exchange in server.exchanges]
    assert [len(prompt) for prompt in prompts] == [512] * 24
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 24
    assert {json.dumps(exchange.body) for exchange in server.exchanges} == {
        json.dumps(
            {
                "model": "tiny",
                "temperature": 0.0,
                "max_tokens": 128,
                "stream": True,
                "stream_options": {"include_usage": True},
                "ignore_eos": True,
            }
        )
    }
    output = capsys.readouterr()
    assert "Successful requests:                     24" in output.out
    assert "Total input tokens:                      12288" in output.out
    assert "Total generated tokens:                  3072" in output.out
    assert "warning" not in output.err


async def test_a_chat_backend_sends_messages_as_text_of_the_asked_length(tmp_path, capsys):
    write_tiny_tokenizer(tmp_path)
    async with OpenAIServer(root=str(tmp_path)) as server:
        assert await bench(server, "--backend vllm-chat") == 0
    exchange = server.exchanges[0]
    assert exchange.path == "/v1/chat/completions"
    (message,) = exchange.body["messages"]
    assert message["role"] == "user"
    assert isinstance(message["content"], str)
    assert exchange.body["max_completion_tokens"] == 5
    assert "Total generated tokens:                  30" in capsys.readouterr().out


async def test_a_chat_without_a_tokenizer_is_refused():
    async with OpenAIServer() as server:
        with pytest.raises(BenchmarkError, match="--tokenizer"):
            await bench(server, "--backend openai-chat")
    assert not server.exchanges


async def test_whole_answers_have_no_time_to_the_first_token(capsys):
    async with OpenAIServer() as server:
        assert await bench(server, "--disable-stream") == 0
    assert {exchange.body["stream"] for exchange in server.exchanges} == {False}
    assert "stream_options" not in server.exchanges[0].body
    output = capsys.readouterr().out
    assert "Total generated tokens:                  30" in output
    assert "Mean TTFT (ms):                          n/a" in output


async def test_what_is_asked_for_reaches_the_body_and_the_headers(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
    extra = ("--extra-request-body", '{"top_k": 3, "temperature": 0.25}')
    async with OpenAIServer() as server:
        flags = "--disable-ignore-eos --temperature 0.5 --header X-A=1 X-B=2=3 --model other"
        assert await bench(server, flags, *extra) == 0
        assert await bench(server, "--api-key given --served-model-name named") == 0
    first, last = server.exchanges[0], server.exchanges[-1]
    assert "ignore_eos" not in first.body
    assert (first.body["top_k"], first.body["temperature"]) == (3, 0.25)
    assert (first.headers["x-a"], first.headers["x-b"]) == ("1", "2=3")
    assert (first.body["model"], last.body["model"]) == ("other", "named")
    assert first.headers["authorization"] == "Bearer from-the-environment"
    assert last.headers["authorization"] == "Bearer given"


async def test_events_of_several_tokens_are_counted_by_usage(tmp_path):
    async def bundles(exchange: Exchange) -> None:
        await exchange.send_events({"choices": [{"text": "a"}]})
        await exchange.send_events({"choices": [{"text": "bcde"}]})
        await exchange.finish(5)

    path = tmp_path / "out.jsonl"
    async with OpenAIServer(answer=bundles) as server:
        assert await bench(server, "--output-details", "--output-file", str(path)) == 0
    line = json.loads(path.read_text())
    assert line["total_output_tokens"] == 30
    assert line["output_lens"] == [5] * 6
    assert line["generated_texts"] == ["abcde"] * 6
    assert all(ttft > 0 for ttft in line["ttfts"])


async def test_other_lengths_than_asked_for_are_told(capsys):
    async def short(exchange: Exchange) -> None:
        await exchange.send_events({"choices": [{"text": "a"}]})
        await exchange.finish(1)

    async with OpenAIServer(answer=short) as server:
        assert await bench(server, "") == 0
        errors = capsys.readouterr().err
        assert "6 of 6 requests have another output length, the first 1 tokens for 5" in errors
        assert await bench(server, "--disable-ignore-eos") == 0
        assert "warning" not in capsys.readouterr().err


async def break_off(exchange: Exchange) -> None:
    await exchange.send_events({"choices": [{"text": "a"}]})
    exchange.writer.close()


async def end_early(exchange: Exchange) -> None:
    await exchange.send_events({"choices": [{"text": "a"}]})
    await exchange.end()


async def send_an_error(exchange: Exchange) -> None:
    await exchange.send_events({"choices": [{"text": "a"}]}, {"error": {"message": "it died"}})
    await exchange.end()


async def refuse(exchange: Exchange) -> None:
    await exchange.send_json({"error": {"message": "too long"}}, 400)


async def send_no_usage(exchange: Exchange) -> None:
    await exchange.send_events({"choices": [{"text": "a"}]}, "[DONE]")
    await exchange.end()


async def send_no_json(exchange: Exchange) -> None:
    await exchange.send_bytes(b"data: {{\n\n")
    await exchange.end()


async def send_nothing(exchange: Exchange) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (break_off, "6 x ClientPayloadError"),
        (end_early, "6 x the stream broke off before its end"),
        (send_an_error, "6 x it died"),
        (refuse, "6 x HTTP 400: too long"),
        (send_no_usage, "6 x the server sent no usage"),
        (send_no_json, "6 x DecodeError"),
        (send_nothing, "6 x no whole answer within --timeout=0.2 s"),
    ],
)
async def test_when_all_fail_the_status_is_one_and_the_message_is_shown(answer, message, capsys):
    async with OpenAIServer(answer=answer) as server:
        assert await bench(server, "--timeout 0.2") == 1
    output = capsys.readouterr()
    assert "Failed requests:                         6" in output.out
    assert message in output.err


async def test_some_failures_leave_the_others_counted(capsys):
    async def every_third_fails(exchange: Exchange) -> None:
        if len(server.exchanges) % 3 == 0:
            await refuse(exchange)
        else:
            await one_token_per_event(exchange)

    async with OpenAIServer(answer=every_third_fails) as server:
        assert await bench(server, "--max-concurrency 1") == 0
    output = capsys.readouterr()
    assert "Successful requests:                     4" in output.out
    assert "Total generated tokens:                  20" in output.out
    assert "2 of 6 requests failed" in output.err


async def test_the_warm_up_has_prompts_of_its_own_and_is_not_counted(capsys):
    async with OpenAIServer() as server:
        assert await bench(server, "--warmup-requests 2 --random-output 40") == 0
    prompts = [tuple(exchange.body["prompt"]) for exchange in server.exchanges]
    assert len(set(prompts)) == len(prompts) == 8
    assert [exchange.max_tokens for exchange in server.exchanges] == [32] * 2 + [40] * 6
    assert "Total generated tokens:                  240" in capsys.readouterr().out


async def test_a_failing_warm_up_ends_the_benchmark():
    async with OpenAIServer(answer=refuse) as server:
        with pytest.raises(BenchmarkError, match="too long"):
            await bench(server, "--warmup-requests 1")


async def test_the_cache_is_flushed_where_the_server_can():
    flushed = []

    async def flush(exchange: Exchange) -> None:
        flushed.append(len(server.exchanges))
        await exchange.send_json({})

    async with OpenAIServer() as server:
        with pytest.raises(BenchmarkError, match="HTTP 404"):
            await bench(server, "--flush-cache")
        server.exchanges.clear()
        server.paths["/flush_cache"] = flush
        assert await bench(server, "--flush-cache --warmup-requests 1") == 0
    assert flushed == [1]


async def test_the_server_is_profiled_while_it_is_measured_where_it_can():
    called = []

    async def answer(exchange: Exchange) -> None:
        called.append((exchange.path, len(server.exchanges)))
        await exchange.send_json({})

    async with OpenAIServer() as server:
        with pytest.raises(BenchmarkError, match="HTTP 404"):
            await bench(server, "--profile")
        server.exchanges.clear()
        server.paths |= {"/start_profile": answer, "/stop_profile": answer}
        assert await bench(server, "--profile --warmup-requests 1 --num-prompts 3") == 0
    assert called == [("/start_profile", 1), ("/stop_profile", 4)]


async def test_a_file_gets_arguments_and_figures_but_no_key(tmp_path):
    path = tmp_path / "out.jsonl"
    async with OpenAIServer() as server:
        flags = f"--api-key secret --tag first --request-rate 1000 --output-file {path}"
        assert await bench(server, flags) == 0
        assert await bench(server, f"--tag second --output-file {path}") == 0
    assert "secret" not in path.read_text()
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["tag"], second["tag"]) == ("first", "second")
    assert (first["request_rate"], second["request_rate"]) == (1000.0, "inf")
    assert first["model"] == "tiny"
    assert first["completed"] == 6
    assert "ttfts" not in first


async def test_ctrl_c_prints_what_there_is():
    """A process of its own, because the signal is the test's too."""
    is_waiting = asyncio.Event()

    async def first_only(exchange: Exchange) -> None:
        if len(server.exchanges) > 1:
            is_waiting.set()
            await asyncio.Event().wait()
        await one_token_per_event(exchange)

    async with OpenAIServer(answer=first_only) as server:
        # In a shell's background SIGINT is ignored, and by all that is started there. Only a signal
        # that has a handler here is at its default in a child.
        in_background = signal.signal(signal.SIGINT, signal.default_int_handler)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.bench_serving", *SMALL.split()),
            *("--port", str(server.port), "--max-concurrency", "1"),
            cwd=Path(__file__).parents[2],
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        signal.signal(signal.SIGINT, in_background)
        try:
            await asyncio.wait_for(is_waiting.wait(), 60)
            process.send_signal(signal.SIGINT)
            output, errors = await asyncio.wait_for(process.communicate(), 60)
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()
    assert "Successful requests:                     1" in output.decode()
    assert "interrupted: 1 of 6 requests had ended" in errors.decode()
    assert process.returncode == 130


def test_without_a_server_the_status_is_two_and_the_flags_are_named(capsys):
    assert bench_serving.main(["--port", "1"]) == 2
    assert "--base-url" in capsys.readouterr().err


@pytest.mark.parametrize("flag", REFUSED)
def test_what_cannot_be_done_is_refused_with_a_reason(flag, capsys):
    with pytest.raises(SystemExit):
        parse_arguments([flag])
    assert REFUSED[flag] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--backend trt", ", ".join(BACKENDS)),
        ("--random-range-ratio 1.5", "not within 0 and 1"),
        ("--num-prompts 0", "not at least 1"),
        ("--request-rate 0", "not above 0"),
        ("--burstiness 2", "--request-rate"),
        ("--backend openai-chat --tokenize-prompt", "a chat takes text"),
        ("--extra-request-body [1]", "no JSON object"),
        ("--extra-request-body {", "no JSON object"),
        ("--header X", "not KEY=VALUE"),
        ("--output-details", "--output-file"),
        ("--num-promts 3", "unrecognized"),
    ],
)
def test_flags_that_cannot_work_are_refused_before_anything_is_sent(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(flags.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
