"""The engine in this process, with its tokens timed: what the offline benchmark sends requests to.

Drives the `EngineCore` that `engine.llm.LLM` drives; knows nothing of flags or figures.
"""

import asyncio
import time

from benchmarks.serving.results import Arrival, BenchRequest, RequestResult
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import EngineError, RequestError
from engine.hub import resolve_checkpoint
from engine.llm import InProcessExecutor
from engine.models.config import load_model_config
from engine.request import Request, RequestOutput, SamplingParams
from engine.runner.model_runner import ModelRunner


class TimedEngine:
    """An engine in this process that notes when each token comes out."""

    def __init__(self, config: EngineConfig, *, temperature: float, ignores_eos: bool) -> None:
        directory = resolve_checkpoint(
            config.model_path, revision=config.revision, download_dir=config.download_dir
        )
        self._config = config
        self._temperature = temperature
        self._ignores_eos = ignores_eos
        self._model_config = load_model_config(directory)
        self._executor = InProcessExecutor(ModelRunner(config))
        self._core: EngineCore | None = None
        self._outputs: dict[str, asyncio.Queue[tuple[float, RequestOutput]]] = {}
        self._num_requests = 0

    async def start(self) -> None:
        """Load and compile; takes seconds to minutes."""
        limits = await self._executor.start(lambda progress: None)
        self._core = EngineCore(self._config, limits, self._executor, self._take)

    async def run(self) -> None:
        """Serve until cancelled."""
        assert self._core is not None
        await self._core.run()

    async def stop(self) -> None:
        await self._executor.stop()

    async def send(self, request: BenchRequest) -> RequestResult:
        """Generate for one request, of token ids; that the engine refuses it is in the result."""
        assert self._core is not None
        assert isinstance(request.prompt, list)
        self._num_requests += 1
        request_id = str(self._num_requests)
        outputs = self._outputs[request_id] = asyncio.Queue()
        start_s = time.perf_counter()
        try:
            sampling = SamplingParams(
                temperature=self._temperature,
                ignore_eos=self._ignores_eos,
                max_tokens=request.output_len,
                seed=self._num_requests,
            )
            self._core.add(
                Request(
                    request_id=request_id,
                    prompt_token_ids=request.prompt,
                    sampling=sampling,
                    eos_token_ids=self._model_config.eos_token_ids,
                    rope_alpha=self._model_config.rope_alpha(len(request.prompt)),
                )
            )
            return await self._collect(request, outputs, start_s)
        except (RequestError, EngineError) as error:
            return RequestResult(request=request, start_s=start_s, latency_s=0.0, error=str(error))
        finally:
            del self._outputs[request_id]
            self._core.abort(request_id)

    async def _collect(
        self,
        request: BenchRequest,
        outputs: "asyncio.Queue[tuple[float, RequestOutput]]",
        start_s: float,
    ) -> RequestResult:
        arrivals = []
        output: RequestOutput | None = None
        while output is None or output.finish_reason is None:
            at_s, output = await outputs.get()
            arrivals.append(Arrival(at_s - start_s, len(output.token_ids)))
        return RequestResult(
            request=request,
            start_s=start_s,
            latency_s=arrivals[-1].at_s,
            prompt_len=len(request.prompt),
            output_len=sum(arrival.num_tokens for arrival in arrivals),
            num_cached_tokens=output.num_cached_tokens,
            arrivals=tuple(arrival for arrival in arrivals if arrival.num_tokens),
        )

    def _take(self, outputs: list[RequestOutput]) -> None:
        at_s = time.perf_counter()
        for output in outputs:
            self._outputs[output.request_id].put_nowait((at_s, output))
