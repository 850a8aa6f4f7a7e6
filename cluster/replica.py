"""The engine's leader as a Serve deployment: owns the core and the gang of hosts.

One replica is one engine. It turns calls into requests, sends each step's tokens to the routers
that wait for them, and brings the gang back when a host dies. No text, no arrays, no JAX.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from typing import Any

import msgspec
from ray import serve

from cluster.calls import Call, CallTable
from cluster.engine_choice import Route
from cluster.grammars import Grammars
from cluster.host_group import HostGroup, HostStatus
from cluster.journal import ChoiceRest, GenerateCall
from cluster.metrics import ENGINE_METRICS
from cluster.openai.engine_client import EngineInfo, RankStatus
from cluster.ray_metrics import RayMetrics
from cluster.response_shelf import ResponseShelf
from cluster.serve_log import leave_out_calls
from cluster.status import StartStatus
from cluster.token_socket import CallError, GenerateEnd
from cluster.user_config import ENGINE_SETTINGS, UserConfig
from cluster.watched_tasks import WatchedTasks
from engine.config import EngineConfig, parse_config
from engine.core import EngineCore
from engine.errors import (
    EngineDiedError,
    EngineNotReadyError,
    QwenOnRayError,
    RequestError,
)
from engine.hub import resolve_checkpoint
from engine.models.config import load_model_config
from engine.models.generation_config import load_generation_defaults
from engine.request import Request, SamplingParams, TokenConstraint
from engine.stats import EngineStats, count
from engine.step import EngineLimits

logger = logging.getLogger(__name__)

_WARM_UP_TIMEOUT_S = 600.0
_RESTART_PAUSE_S = 1.0
_MAX_RESTART_PAUSE_S = 30.0


class Engine:
    """One engine. All state belongs to the replica's event loop.

    Invariant: `_core` is set exactly while the gang can take steps.
    """

    async def __init__(self, config_fields: Mapping[str, Any]) -> None:
        """Start the gang; returns when it serves, so that Serve counts it as running only then.

        Raises:
            CapacityError, CheckpointError, ConfigError: Naming what to change.
        """
        self._config: EngineConfig = parse_config(config_fields)
        # Routers ask it how it is each second; a line for each would bury what matters.
        leave_out_calls("describe")
        context = serve.get_replica_context()
        self._user_config = UserConfig(
            self._config,
            deployment="Engine",
            settings=ENGINE_SETTINGS,
            replica=(context.app_name, context.replica_id.unique_id),
        )
        self._status = StartStatus(context.app_name, context.replica_id.unique_id)
        self._status.forget_the_dead()
        name = f"{self._config.model_names[0]}/{context.replica_id.unique_id}"
        self._group = HostGroup(self._config, name=name)
        self._core: EngineCore | None = None
        self._core_ready = asyncio.Event()
        self._run: asyncio.Task[None] | None = None
        self._engine_id: str = context.replica_id.unique_id
        self._calls = CallTable(
            engine_id=self._engine_id,
            on_abort=self._abort,
            silence_timeout_s=self._config.host_timeout_s,
        )
        self._shelf = ResponseShelf(self._config.max_stored_responses)
        self._tasks = WatchedTasks()
        self._limits: EngineLimits | None = None
        # Of earlier epochs: counters that fell would count twice.
        self._past_stats = EngineStats()
        self._has_served = False
        self._lost_s = 0.0
        self._context_length = 0
        try:
            await self._load_model_facts()
            await self._start_core()
        except QwenOnRayError as error:
            logger.error("The engine did not start. %s", error)
            self._status.failed(str(error))
            await self._group.stop()
            raise
        self._tasks.start("bring the hosts back when one dies", self._supervise())
        self._tasks.start("watch over the routers", self._calls.watch_routers())
        labels = {"model_name": self._config.model_names[0], "engine": self._engine_id}
        metrics = RayMetrics(ENGINE_METRICS, labels)
        self._tasks.start("publish the metrics", metrics.publish_for_ever(self._info))

    async def __del__(self) -> None:
        # Serve awaits this when the replica is to go, after its requests have drained.
        await self._tasks.close()
        if self._run is not None:
            self._run.cancel()
            await asyncio.gather(self._run, return_exceptions=True)
        self._calls.disconnect()
        self._grammars.close()
        await self._group.stop()
        if self._has_served:
            # Why a start failed stays to be read after this replica.
            self._status.clear()

    async def reconfigure(self, user_config: object) -> None:
        """Serve's way to change a deployment without a restart; see `UserConfig.take`."""
        await self._user_config.take(user_config)

    async def check_health(self) -> None:
        """Serve's question, asked every few seconds; it replaces a replica that raises.

        A dead gang is no reason, because this replica brings it back. That nobody is left to do
        so is one, and so is that there have been no hosts for so long that requests are turned
        away: Serve has no other way to hear of it, and shows the deployment as unhealthy until an
        engine serves.

        Raises:
            EngineError: A task that should run as long as the replica has ended.
            EngineNotReadyError: There have been no hosts for `hold_timeout_s`.
        """
        self._tasks.check()
        lost_s = time.monotonic() - self._lost_s
        if self._core is None and not self._group.hosts and lost_s > self._config.hold_timeout_s:
            raise EngineNotReadyError(
                f"The engine has been without hosts for {lost_s:.0f} s (epoch {self._group.epoch})."
            )
        self._user_config.is_in_service = True

    # Of each call's `route` only Serve's choice of a replica makes use.

    async def describe(self, *, route: Route) -> bytes:
        """How this engine is, as an encoded `EngineInfo`."""
        del route
        return msgspec.msgpack.encode(self._info())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve asks every few seconds, for `cluster.autoscaling.read_load`."""
        core = self._core
        stats = self._stats()
        return {
            "num_running": stats.num_running,
            # While the hosts are rebuilt, calls wait for them.
            "num_waiting": stats.num_waiting if core else self._calls.num_calls,
            "queue_delay_s": core.queue_delay_s() if core else 0.0,
            "page_use": stats.page_use,
            "requests_total": stats.requests_total,
            "served_total": stats.served_total,
            "service_s_total": stats.service_s_total,
        }

    async def profile(self, num_steps: int, *, route: Route) -> bytes:
        """Have every host trace its next steps; 0 ends a trace early.

        Returns:
            An encoded `GenerateEnd` without tokens, which carries the error where there was one.
        """
        try:
            self._group.profile(num_steps)
        except QwenOnRayError as error:
            failure = CallError(type(error).__name__, str(error))
            return msgspec.msgpack.encode(GenerateEnd(error=failure))
        return msgspec.msgpack.encode(GenerateEnd())

    async def generate(self, payload: bytes, *, route: Route) -> bytes:
        """Run a `GenerateCall` to its end; the tokens go to the router's socket meanwhile.

        Cancelling it aborts the call's requests and frees their pages within a step.

        Returns:
            An encoded `GenerateEnd`, which carries the error where there was one.
        """
        call = msgspec.msgpack.decode(payload, type=GenerateCall)
        # Entered before the hosts are waited for: its router knows from here on that it is alive.
        running = self._calls.open(call)
        self._past_stats.moved_total += running.attempt > 0
        try:
            error = await self._run_call(running)
        finally:
            self._calls.close(running)
        logger.log(
            logging.DEBUG if error is None else logging.INFO,
            "%s, attempt %d, ended after %d tokens: %s",
            running.journal.request.request_id,
            running.attempt,
            sum(running.num_tokens.values()),
            "whole" if error is None else error.message,
        )
        end = GenerateEnd(running.num_tokens, error, running.was_computed)
        return msgspec.msgpack.encode(end)

    async def recall(self, request_id: str, tenant: bytes, *, route: Route) -> bytes:
        """What has come of a tenant's request, as an encoded `StreamRecord`; empty if unknown."""
        del route
        record = self._calls.recall(request_id, tenant)
        return b"" if record is None else msgspec.msgpack.encode(record)

    async def shelve(self, payload: bytes, *, route: Route) -> bytes:
        """Keep, give or forget a response for routers; see `ResponseShelf.answer`."""
        del route
        return self._shelf.answer(payload, self._engine_id)

    async def _run_call(self, running: Call) -> CallError | None:
        """Run a call to its end, and say what ended it early."""
        try:
            self._check_weights(running.journal.request.weights)
            grammar = running.journal.request.grammar
            constraints = {
                choice.index: await self._grammars.constraint(grammar, choice.output_token_ids)
                for choice in running.journal.rest()
            }
            core = await self._wait_for_core()
            try:
                # Some may not be wanted any longer before there were hosts for them.
                for choice in running.journal.rest():
                    core.add(self._request(running, choice, constraints[choice.index]))
                await running.ended
            finally:
                for request_id in running.request_ids.values():
                    core.abort(request_id)
        except RequestError as error:
            return CallError(type(error).__name__, str(error), error.param, error.code)
        except QwenOnRayError as error:
            return CallError(type(error).__name__, str(error))
        return None

    def _check_weights(self, weights: str) -> None:
        # While an update goes on, routers of the model before meet engines of the one after it.
        if weights not in ("", self._config.weights_name):
            raise EngineNotReadyError(
                f"This engine serves {self._config.weights_name}, and the request was made for "
                f"{weights}, which is served no longer. Send it again."
            )

    def _info(self) -> EngineInfo:
        ranks = tuple(self._rank_status(host) for host in self._group.hosts)
        is_ready = self._core is not None and all(rank.state == "ready" for rank in ranks)
        limits = self._limits
        return EngineInfo(
            is_ready=is_ready,
            engine_id=self._engine_id,
            epoch=self._group.epoch,
            status="ready" if is_ready else f"rebuilding its hosts, epoch {self._group.epoch}",
            page_size=limits.page_size if limits else 0,
            context_length=self._context_length,
            vocab_size=limits.vocab_size if limits else 0,
            eos_token_ids=self._model.eos_token_ids,
            generation_defaults=self._generation_defaults,
            fingerprint=limits.model_fingerprint if limits else "",
            ranks=ranks,
            stats=self._stats(),
        )

    def _stats(self) -> EngineStats:
        return self._past_stats + self._core.stats if self._core else self._past_stats

    def _request(
        self, running: Call, choice: ChoiceRest, constraint: TokenConstraint | None
    ) -> Request:
        return Request(
            request_id=running.request_ids[choice.index],
            prompt_token_ids=[*choice.prompt_token_ids, *choice.output_token_ids],
            num_prompt_output_tokens=len(choice.output_token_ids),
            sampling=choice.sampling,
            choice_index=choice.sample_index,
            eos_token_ids=self._model.eos_token_ids,
            rope_alpha=self._model.rope_alpha(len(choice.prompt_token_ids)),
            cache_salt=running.journal.request.cache_salt,
            constraint=constraint,
        )

    def _abort(self, request_id: str) -> None:
        if self._core is not None:
            # Its router has found a stop string.
            self._core.abort(request_id, "stop")

    async def _wait_for_core(self) -> EngineCore:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.hold_timeout_s):
                while self._core is None:
                    await self._core_ready.wait()
        if self._core is None:
            raise EngineNotReadyError(
                f"The engine is rebuilding its hosts (epoch {self._group.epoch}); it was not ready "
                f"within --hold-timeout-s={self._config.hold_timeout_s:g}."
            )
        return self._core

    # Life and death of the gang ----------------------------------------------------------------

    async def _load_model_facts(self) -> None:
        directory = await asyncio.to_thread(
            resolve_checkpoint,
            self._config.model_path,
            revision=self._config.revision,
            download_dir=self._config.download_dir,
            has_weights=False,
        )
        self._model = load_model_config(directory)
        self._generation_defaults = load_generation_defaults(directory)
        self._grammars = Grammars(self._config, self._model.eos_token_ids)

    async def _start_core(self) -> None:
        started_s = time.monotonic()
        self._status.epoch = self._group.epoch + 1
        self._limits = await self._group.start(self._status.update)
        core = EngineCore(self._config, self._limits, self._group, self._calls.deliver)
        self._run = asyncio.create_task(core.run())
        if not self._config.skip_server_warmup:
            await self._warm_up(core, self._run)
        self._core = core
        self._calls.epoch = self._group.epoch
        self._core_ready.set()
        self._has_served = True
        self._context_length = core.max_len
        self._status.ready()
        logger.info(
            "Epoch %d serves after %.1f s: %d hosts, %d KV pages of %d tokens, context %d.",
            self._group.epoch,
            time.monotonic() - started_s,
            self._config.nnodes,
            self._limits.num_pages - 1,
            self._limits.page_size,
            core.max_len,
        )

    async def _warm_up(self, core: EngineCore, run: "asyncio.Task[None]") -> None:
        sampling = SamplingParams(max_tokens=4, seed=0, temperature=0.0, ignore_eos=True)
        core.add(Request(request_id="warm-up", prompt_token_ids=[0] * 8, sampling=sampling))
        idle = asyncio.create_task(core.wait_until_idle())
        try:
            await asyncio.wait(
                [idle, run],
                timeout=_WARM_UP_TIMEOUT_S,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if run.done():
                await run
            if not idle.done():
                raise EngineDiedError(
                    f"The warm-up request took more than {_WARM_UP_TIMEOUT_S:.0f} s."
                )
        finally:
            idle.cancel()

    async def _supervise(self) -> None:
        """Run the core; when its gang dies, fail what ran, start the next epoch, and go on."""
        pause_s = _RESTART_PAUSE_S
        while True:
            if self._core is not None:
                await self._run_until_failure()
                pause_s = _RESTART_PAUSE_S
            try:
                await self._start_core()
            except QwenOnRayError as error:
                logger.error("The engine did not come back: %s", error)
                self._status.failed(str(error))
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _MAX_RESTART_PAUSE_S)

    async def _run_until_failure(self) -> None:
        run = self._run
        assert run is not None, "there is a core, so its loop was started"
        failed = asyncio.create_task(self._group.failed())
        try:
            await asyncio.wait([run, failed], return_when=asyncio.FIRST_COMPLETED)
            error = failed.result() if failed.done() else run.exception()
            if not isinstance(error, QwenOnRayError):
                # A fault of the engine itself: the requests fail, the next epoch starts clean.
                logger.error("the engine's loop failed", exc_info=error)
                error = EngineDiedError(f"The engine's loop failed: {error!r}", cause="leader")
        finally:
            run.cancel()
            failed.cancel()
            await asyncio.gather(run, failed, return_exceptions=True)
        computed: frozenset[str] = frozenset()
        if self._core is not None:
            computed = self._core.running_request_ids
            self._past_stats += self._core.stats.counters()
        cause = error.cause if isinstance(error, EngineDiedError) else "failed"
        count(self._past_stats.restarts_total, cause)
        self._core = None
        self._lost_s = time.monotonic()
        self._core_ready.clear()
        logger.error(
            "Epoch %d ended, %d calls go back: %s", self._group.epoch, self._calls.num_calls, error
        )
        self._calls.fail_all(EngineDiedError(str(error)), computed)

    def _rank_status(self, host: HostStatus) -> RankStatus:
        age_s = time.monotonic() - host.heard_s
        is_silent = age_s > self._config.host_timeout_s
        state = "silent" if is_silent else "ready" if host.is_ready else host.progress.phase
        return RankStatus(
            rank=host.rank, state=state, note=host.name, seconds_since_answer=round(age_s, 1)
        )
