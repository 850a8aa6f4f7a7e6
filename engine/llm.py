"""Generate offline, in this process, without Ray: `LLM(config).generate(prompts)`."""

import asyncio
import concurrent.futures
import contextlib
import functools
import sys
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec
import numpy as np
from tqdm.auto import tqdm

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import CheckpointError
from engine.grammar import Constraint, Grammar, GrammarCompiler
from engine.hub import resolve_checkpoint, resolve_tokenizer
from engine.models.config import ModelConfig, load_model_config
from engine.request import FinishReason, Request, RequestOutput, SamplingParams, TokenLogprobs
from engine.runner.model_runner import ModelRunner, PendingStep
from engine.step import (
    EngineLimits,
    ProgressCallback,
    StartProgress,
    StepMasks,
    StepPlan,
    StepResult,
)
from engine.text.detokenizer import Detokenizer
from engine.text.tokenizer import Tokenizer, load_tokenizer

_T = TypeVar("_T")
_PendingStepFuture = concurrent.futures.Future[PendingStep]


@dataclass(slots=True, kw_only=True)
class Completion:
    """What was generated for one prompt.

    Attributes:
        text: Without the end token; empty where the model directory has no tokenizer.
        token_ids: The end token included.
        logprobs: One per token, or empty if not asked for.
        prompt_logprobs: One per prompt token but the first, or empty if not asked for.
        embedding: float32 [D], the prompt's last hidden state, if asked for.
    """

    prompt_token_ids: list[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    embedding: np.ndarray | None = None


class InProcessExecutor:
    """Implements `Executor` with a ModelRunner and two threads: one dispatches, one waits."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._dispatcher = concurrent.futures.ThreadPoolExecutor(1, "dispatch")
        self._waiter = concurrent.futures.ThreadPoolExecutor(1, "wait")
        self._unsampled: tuple[_PendingStepFuture, asyncio.Future[StepResult]]

    async def start(self, on_progress: ProgressCallback) -> EngineLimits:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._dispatcher, self._runner.start, on_progress)

    def execute(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        pending = self._dispatcher.submit(self._runner.dispatch, plan)
        if not len(plan.masked_rows):
            return self._wait(pending)
        self._unsampled = pending, asyncio.get_running_loop().create_future()
        return self._unsampled[1]

    def mask(self, masks: StepMasks) -> None:
        dispatched, future = self._unsampled

        def sample_masked() -> PendingStep:
            dispatched.result()  # Why it failed, if it did.
            return self._runner.sample_masked(masks)

        result = self._wait(self._dispatcher.submit(sample_masked))
        result.add_done_callback(functools.partial(_pass_on, future))

    def _wait(self, pending: _PendingStepFuture) -> asyncio.Future[StepResult]:
        return asyncio.wrap_future(self._waiter.submit(lambda: pending.result().wait()))

    async def stop(self) -> None:
        for thread in (self._dispatcher, self._waiter):
            # The step under way holds what is to be freed.
            await asyncio.to_thread(thread.shutdown, cancel_futures=True)
        self._runner.close()


class LLM:
    """A model in this process. Not for use by several threads at once.

    >>> with LLM(EngineConfig(model_path="…")) as llm:
    ...     llm.generate(["The capital of France is"], SamplingParams(max_tokens=8))
    """

    def __init__(self, config: EngineConfig, *, show_progress: bool = False) -> None:
        """Load and compile; takes seconds to minutes.

        Args:
            config: `nnodes` is 1.
            show_progress: Draw a bar for what takes long, on stderr.

        Raises:
            CheckpointError, CapacityError, ConfigError: Naming what to change.
        """
        self.config = config
        self._show_progress = show_progress
        directory = resolve_checkpoint(
            config.model_path, revision=config.revision, download_dir=config.download_dir
        )
        self.model_config: ModelConfig = load_model_config(directory)
        self.tokenizer = _find_tokenizer(config, directory)
        self._completions: dict[str, Completion] = {}
        self._grammars: GrammarCompiler | None = None
        self._bar: tqdm[Any] | None = None
        self._num_requests = 0
        self._runner = ModelRunner(config)
        self._executor = InProcessExecutor(self._runner)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()
        try:
            self.limits: EngineLimits = self._await(self._executor.start(self._report))
            self.core: EngineCore = self._await(self._make_core())
            self._run = asyncio.run_coroutine_threadsafe(self.core.run(), self._loop)
        except BaseException:
            self._end_thread()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def num_compiles_since_ready(self) -> int:
        """Programs compiled while serving; anything but 0 is a fault."""
        return self._runner.num_compiles_since_ready

    def close(self) -> None:
        """Free the model; safe to call twice."""
        if self._thread.is_alive():
            self._run.cancel()
            self._await(self._executor.stop())
            self._end_thread()

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        grammar: Grammar | Sequence[Grammar | None] | None = None,
    ) -> list[Completion]:
        """Generate one completion per prompt; all of them run together.

        Args:
            prompts: Texts, or token ids.
            sampling: For all prompts, or one for each. Stop strings are the HTTP surface's.
            grammar: What the completions must be, or what each must; see `engine.grammar`.

        Returns:
            In the order of the prompts.

        Raises:
            RequestError: A prompt or a parameter that can never work; nothing was generated.
        """
        if sampling is None or isinstance(sampling, SamplingParams):
            sampling = [sampling or SamplingParams()] * len(prompts)
        token_ids = [self._token_ids(prompt) for prompt in prompts]
        if grammar is None or isinstance(grammar, Grammar):
            grammar = [grammar] * len(prompts)
        constraints = [self._constraint(each) for each in grammar]
        return self._await(self._generate(token_ids, sampling, constraints))

    async def _generate(
        self,
        prompts: list[list[int]],
        sampling: Sequence[SamplingParams],
        constraints: Sequence[Constraint | None],
    ) -> list[Completion]:
        added: dict[str, Completion] = {}
        with tqdm(total=len(prompts), unit="prompt", disable=not self._show_progress) as self._bar:
            try:
                for prompt, params, constraint in zip(prompts, sampling, constraints, strict=True):
                    request = self._request(prompt, params, constraint)
                    added[request.request_id] = Completion(prompt_token_ids=prompt)
                    self._completions[request.request_id] = added[request.request_id]
                    self.core.add(request)
                idle = asyncio.ensure_future(self.core.wait_until_idle())
                run = asyncio.wrap_future(self._run)
                await asyncio.wait([idle, run], return_when=asyncio.FIRST_COMPLETED)
                idle.cancel()
                if run.done():
                    run.result()
            finally:
                for request_id in added:
                    del self._completions[request_id]
                    self.core.abort(request_id)
        for completion in added.values():
            completion.text = self._text(completion)
        return list(added.values())

    def _constraint(self, grammar: Grammar | None) -> Constraint | None:
        if grammar is None:
            return None
        if self._grammars is None:
            self._grammars = GrammarCompiler(
                self._known_tokenizer(), end_token_ids=self.model_config.eos_token_ids
            )
        return self._grammars.constraint(grammar)

    def _request(
        self, prompt: list[int], params: SamplingParams, constraint: Constraint | None
    ) -> Request:
        self._num_requests += 1
        if params.seed is None:
            params = msgspec.structs.replace(params, seed=self.core.draw_seed())
        return Request(
            request_id=str(self._num_requests),
            prompt_token_ids=prompt,
            sampling=params,
            eos_token_ids=self.model_config.eos_token_ids,
            rope_alpha=self.model_config.rope_alpha(len(prompt)),
            constraint=constraint,
        )

    def _take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            completion = self._completions.get(output.request_id)
            if completion is None:
                continue
            completion.token_ids.extend(output.token_ids)
            completion.logprobs.extend(output.logprobs)
            completion.prompt_logprobs.extend(output.prompt_logprobs)
            completion.finish_reason = output.finish_reason
            completion.num_cached_tokens = output.num_cached_tokens
            if output.embedding:
                completion.embedding = np.frombuffer(output.embedding, "<f4")
            if output.finish_reason is not None and self._bar is not None:
                self._bar.update()

    def _report(self, progress: StartProgress) -> None:
        if not self._show_progress:
            return
        if self._bar is None or self._bar.desc != progress.phase:
            if self._bar is not None:
                self._bar.close()
            self._bar = tqdm(total=progress.total or None, desc=progress.phase)
        self._bar.n = progress.done
        self._bar.refresh()

    async def _make_core(self) -> EngineCore:
        # The bound protects a server from its clients; here one caller waits for all of them.
        config = self.config.model_copy(update={"max_queued_requests": sys.maxsize})
        return EngineCore(config, self.limits, self._executor, self._take)

    def _token_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        return self._known_tokenizer().encode(prompt, add_special_tokens=True)

    def _known_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise CheckpointError(
                f"{self.config.model_path} has no tokenizer: give token ids, or --tokenizer-path."
            )
        return self.tokenizer

    def _text(self, completion: Completion) -> str:
        if self.tokenizer is None:
            return ""
        detokenizer = Detokenizer(self.tokenizer)
        ids = completion.token_ids
        if completion.finish_reason == "stop":
            ids = ids[:-1]
        text = "".join(detokenizer.push(token_id).text for token_id in ids)
        return text + detokenizer.finish().text

    def _await(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _pass_on(future: asyncio.Future[StepResult], result: asyncio.Future[StepResult]) -> None:
    if future.done():
        return
    if result.cancelled():
        future.cancel()
    elif (error := result.exception()) is not None:
        future.set_exception(error)
    else:
        future.set_result(result.result())


def _find_tokenizer(config: EngineConfig, directory: Path) -> Tokenizer | None:
    if config.tokenizer_path is not None:
        directory = resolve_tokenizer(
            config.model_path, config.tokenizer_path, download_dir=config.download_dir
        )
        return load_tokenizer(directory)
    # A model without a tokenizer still serves prompts that are token ids.
    with contextlib.suppress(CheckpointError):
        return load_tokenizer(directory)
    return None
