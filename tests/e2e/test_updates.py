"""An application is deployed anew with other arguments while a stream runs: it goes on."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from own_ray import own_ray  # before Ray, whose environment it sets
from ray import serve
from ray.serve.config import HTTPOptions
from tiny_checkpoint import tiny_checkpoint

import serve_app
from cluster.addresses import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HOST, NAME = "127.0.0.1", "updated"
NUM_TOKENS = 3000
TIMEOUT_S = 240


@pytest.fixture
def url() -> Iterator[str]:
    with own_ray(num_cpus=4):
        port = free_port(HOST)
        serve.start(http_options=HTTPOptions(host=HOST, port=port))
        yield f"http://{HOST}:{port}"
        serve.shutdown()


def deploy(args: dict[str, Any]) -> None:
    """Deploy, and wait until what was there before is gone, too."""
    serve.run(serve_app.build(args), name=NAME, route_prefix="/")


def engines(url: str) -> list[str]:
    return [engine["id"] for engine in httpx.get(f"{url}/fleet", timeout=30).json()["engines"]]


class Reader(threading.Thread):
    """Reads one stream to its end.

    Attributes:
        has_begun: Text has come.
        ids: Of the engines that its events name, each once.
        failure: What ended it, if nothing of its own did.
    """

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self.has_begun = threading.Event()
        self.text = ""
        self.ids: list[str] = []
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            self._read()
        except Exception as error:
            self.failure = error

    def _read(self) -> None:
        request = {
            "model": NAME,
            "prompt": "Once upon a time",
            "max_tokens": NUM_TOKENS,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        with httpx.stream(
            "POST", f"{self._url}/v1/completions", json=request, timeout=TIMEOUT_S
        ) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                field, _, value = line.partition(": ")
                if field == "id":
                    engine = value.partition(":")[0]
                    self.ids += [] if engine in self.ids else [engine]
                elif value == "[DONE]":
                    return
                elif field == "data":
                    self.text += json.loads(value)["choices"][0]["text"]
                    self.has_begun.set()
        raise httpx.RemoteProtocolError("the stream ended without its end")


def read(url: str) -> Reader:
    reader = Reader(url)
    reader.start()
    return reader


def test_a_stream_outlives_an_update_that_replaces_its_engine(url: str, tmp_path: Path) -> None:
    args: dict[str, Any] = {
        "model_path": str(tiny_checkpoint(tmp_path / "model", context_length=4096)),
        "served_model_name": NAME,
        "device": "cpu",
        "dtype": "float32",
        "context_length": 4096,
        "max_total_tokens": 8192,
        "max_running_requests": 4,
        "chunked_prefill_size": 64,
        "drain_timeout_s": 1.0,
        "hold_timeout_s": TIMEOUT_S,
    }
    deploy(args)
    whole = read(url)
    whole.join(TIMEOUT_S)
    assert whole.failure is None
    assert whole.text
    before = engines(url)
    reader = read(url)
    assert reader.has_begun.wait(TIMEOUT_S), reader.failure
    deploy(args | {"max_running_requests": 3})
    reader.join(TIMEOUT_S)
    assert reader.failure is None
    assert reader.text == whole.text
    assert reader.ids[0] == before[0]
    assert len(reader.ids) == 2, "it went on with the new engine"
    assert reader.ids[1] in engines(url)
