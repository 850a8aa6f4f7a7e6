"""The HTTP client: sends OpenAI requests and notes when tokens arrive.

The client shares its machine with the server, so every microsecond per streamed event counts:
aiohttp costs a third of httpx or less, and msgspec reads only the fields that are needed.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from benchmarks.serving.answer import Answer, explain
from benchmarks.serving.errors import BenchmarkError
from benchmarks.serving.results import Arrival, BenchRequest, RequestResult

BACKENDS = (
    "sgl-jax",
    "sgl-jax-oai",
    "sgl-jax-oai-chat",
    "sglang",
    "sglang-native",
    "sglang-oai",
    "sglang-oai-chat",
    "vllm",
    "vllm-chat",
    "openai",
    "openai-chat",
    "lmdeploy",
    "lmdeploy-chat",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """What all requests have in common.

    Attributes:
        is_chat: Use /v1/chat/completions, else /v1/completions.
        extra_body: Put into each request's body, over what would be there.
        keeps_text: Keep what is generated, which costs the client time.
    """

    model: str
    is_chat: bool
    streams: bool = True
    temperature: float = 0.0
    ignores_eos: bool = True
    extra_body: dict[str, Any] = field(default_factory=dict)
    keeps_text: bool = False


class _ModelCard(msgspec.Struct):
    id: str
    root: str | None = None


class _ModelList(msgspec.Struct):
    data: list[_ModelCard] = []


class ServingClient:
    """Sends the benchmark's requests over one pool of connections."""

    def __init__(
        self, session: aiohttp.ClientSession, base_url: str, options: RequestOptions
    ) -> None:
        path = "/v1/chat/completions" if options.is_chat else "/v1/completions"
        self._url = base_url + path
        self._session = session
        self._options = options

    async def send(self, request: BenchRequest) -> RequestResult:
        """Send one request; what goes wrong is in the result."""
        body = msgspec.json.encode(self._body(request))
        answer = Answer(keeps_text=self._options.keeps_text)
        error: str | None = None
        start_s = time.perf_counter()
        latency_s = 0.0
        try:
            async with self._session.post(
                self._url, data=body, headers=request.headers
            ) as response:
                if response.status != 200:
                    error = f"HTTP {response.status}: {explain(await response.read())}"
                elif self._options.streams:
                    async for part in response.content.iter_any():
                        latency_s = time.perf_counter() - start_s
                        answer.feed(part, latency_s)
                else:
                    answer.take_whole(await response.read())
                    latency_s = time.perf_counter() - start_s
        except TimeoutError:
            error = f"no whole answer within --timeout={self._session.timeout.total:g} s"
        except (aiohttp.ClientError, OSError, msgspec.DecodeError) as fault:
            error = f"{type(fault).__name__}: {fault}"
        usage = answer.usage
        error = error or answer.error
        if error is None and usage is None:
            error = (
                "the server sent no usage: without it tokens cannot be counted"
                if answer.is_done or not self._options.streams
                else "the stream broke off before its end"
            )
        if error is not None or usage is None:
            return RequestResult(
                request=request,
                start_s=start_s,
                latency_s=time.perf_counter() - start_s,
                error=error,
            )
        details = usage.prompt_tokens_details
        num_tokens = usage.completion_tokens or 0
        arrivals = answer.arrivals()
        if self._options.streams and num_tokens and not arrivals:
            # Tokens without any visible text: all that is known is when they had all come.
            arrivals = (Arrival(latency_s, num_tokens),)
        return RequestResult(
            request=request,
            start_s=start_s,
            latency_s=latency_s,
            prompt_len=usage.prompt_tokens,
            output_len=num_tokens,
            num_cached_tokens=(details.cached_tokens or 0) if details else 0,
            arrivals=arrivals,
            text=answer.text,
            thoughts=answer.thoughts,
            finish_reason=answer.finish_reason,
        )

    def _body(self, request: BenchRequest) -> dict[str, Any]:
        options = self._options
        body: dict[str, Any] = {"model": options.model, "temperature": options.temperature}
        if options.is_chat:
            message = {"role": "user", "content": request.prompt}
            body["messages"] = [*request.history, message]
            body["max_completion_tokens"] = request.output_len
        else:
            body["prompt"] = request.prompt
            body["max_tokens"] = request.output_len
        body["stream"] = options.streams
        if options.streams:
            body["stream_options"] = {"include_usage": True}
        if options.ignores_eos:
            body["ignore_eos"] = True
        return body | options.extra_body


def open_session(
    *, api_key: str | None, timeout_s: float, headers: Mapping[str, str] | None = None
) -> aiohttp.ClientSession:
    """Make the pool of connections that a benchmark's requests go over.

    Args:
        api_key: None takes the environment's OPENAI_API_KEY, if there is one.
        timeout_s: For each request as a whole.
    """
    key = api_key or os.environ.get("OPENAI_API_KEY")
    authorization = {"Authorization": f"Bearer {key}"} if key else {}
    return aiohttp.ClientSession(
        headers={**(headers or {}), **authorization, "Content-Type": "application/json"},
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        connector=aiohttp.TCPConnector(limit=0),
    )


async def find_model(
    session: aiohttp.ClientSession, base_url: str, name: str | None
) -> tuple[str, str | None]:
    """Ask the server for its models.

    Returns:
        The model's name, `name` itself or else the first, and where the server has it from.

    Raises:
        BenchmarkError: There is no server, or it lists no models and `name` is None.
    """
    url = f"{base_url}/v1/models"
    try:
        async with session.get(url) as response:
            text = await response.read()
            status = response.status
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise BenchmarkError(
            f"no server answers at {base_url} ({error}). Start one, or say where it is with "
            "--base-url or --host and --port."
        ) from error
    try:
        cards = msgspec.json.decode(text, type=_ModelList).data if status == 200 else []
    except msgspec.DecodeError:
        cards = []
    if name is not None:
        return name, next((card.root for card in cards if card.id == name), None)
    if not cards:
        raise BenchmarkError(
            f"{url} lists no models (HTTP {status}: {explain(text)}). Name one with --model."
        )
    return cards[0].id, cards[0].root


async def ask_profiler(session: aiohttp.ClientSession, base_url: str, action: str) -> None:
    """Have the server start or stop writing a trace.

    Raises:
        BenchmarkError: It cannot.
    """
    async with session.post(f"{base_url}/{action}_profile") as response:
        text = await response.read()
        if response.status != 200:
            raise BenchmarkError(
                f"--profile: the server's /{action}_profile answered HTTP {response.status} "
                f"({explain(text)})."
            )


async def flush_cache(session: aiohttp.ClientSession, base_url: str) -> None:
    """Have the server forget its prefix cache.

    Raises:
        BenchmarkError: It cannot.
    """
    async with session.post(f"{base_url}/flush_cache") as response:
        text = await response.read()
        if response.status != 200:
            raise BenchmarkError(
                f"--flush-cache: the server's /flush_cache answered HTTP {response.status} "
                f"({explain(text)}). Leave the flag out: random prompts find nothing in a cache."
            )
