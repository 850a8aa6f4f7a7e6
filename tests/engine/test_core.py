"""The core over a simulated device: whatever is scheduled, each request gets its own tokens."""

import asyncio
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_device import VOCAB_SIZE, SimulatedDevice, expected_output, next_token

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import ContextLengthError, EngineBusyError, EngineDiedError, RequestError
from engine.request import Request, RequestOutput, SamplingParams
from engine.scheduling import scheduler
from engine.scheduling.buckets import bucket_table
from engine.scheduling.prefix_cache import page_key
from engine.step import EngineLimits, StepPlan, StepResult, encode

ALL_TOKENS = range(VOCAB_SIZE)


class Engine:
    """A core, its simulated device, and what each request got."""

    def __init__(self, *, num_pages: int = 64, context_length: int = 96, **overrides: object):
        fields = {"page_size": 4, "max_running_requests": 4, "chunked_prefill_size": 8}
        self.config = EngineConfig.model_validate({"model_path": "tiny", **fields, **overrides})
        self.limits = EngineLimits(
            num_pages=num_pages,
            page_size=self.config.page_size,
            context_length=context_length,
            max_running_requests=self.config.max_running_requests,
            buckets=bucket_table(self.config, context_length=context_length, platform="cpu"),
            vocab_size=VOCAB_SIZE,
        )
        self.device = SimulatedDevice(self.limits)
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.finished: dict[str, RequestOutput] = {}
        self.core = EngineCore(self.config, self.limits, self.device, self._take)
        self._all_done = asyncio.Event()

    def _take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            assert output.first_index == len(self.tokens[output.request_id])
            self.tokens[output.request_id].extend(output.token_ids)
            if output.finish_reason:
                self.finished[output.request_id] = output
        if self.core.num_requests == 0:
            self._all_done.set()

    async def run_until_done(self) -> None:
        run = asyncio.ensure_future(self.core.run())
        done = asyncio.ensure_future(self._all_done.wait())
        async with asyncio.timeout(20):
            await asyncio.wait([run, done], return_when=asyncio.FIRST_COMPLETED)
            if run.done():
                run.result()
            # A step that was planned with ended requests may still be under way.
            while self.core._scheduler._ending:
                await asyncio.sleep(0)
        run.cancel()
        done.cancel()
        await asyncio.gather(run, done, return_exceptions=True)
        self.core.check_integrity()


def make_request(name: str, prompt: list[int], max_tokens: int = 6, **sampling: object) -> Request:
    params = SamplingParams(max_tokens=max_tokens, seed=1, **sampling)  # type: ignore[arg-type]
    return Request(request_id=name, prompt_token_ids=prompt, sampling=params)


workloads = st.lists(
    st.tuples(
        st.integers(0, 2),  # which shared prefix
        st.integers(0, 20),  # how much of it
        st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=12),
        st.integers(1, 12),  # max_tokens
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(
    workload=workloads,
    num_pages=st.integers(10, 40),
    page_size=st.sampled_from([1, 4, 16]),
    overlap=st.booleans(),
    caching=st.booleans(),
    end_tokens=st.sets(st.integers(0, VOCAB_SIZE - 1), max_size=8),
)
def test_every_request_gets_its_own_tokens_whatever_runs_beside_it(
    workload, num_pages, page_size, overlap, caching, end_tokens
):
    prefixes = [[7, 7, 7, 7] * 5, list(range(20)), [3] * 20]

    async def scenario() -> None:
        engine = Engine(
            num_pages=max(num_pages, 48 // page_size + 2),
            context_length=48,
            page_size=page_size,
            disable_overlap_schedule=not overlap,
            enable_prefix_caching=caching,
        )
        prompts = {}
        for index, (which, length, tail, max_tokens) in enumerate(workload):
            prompts[str(index)] = (prefixes[which][:length] + tail, max_tokens)
            request = make_request(str(index), *prompts[str(index)])
            request.eos_token_ids = tuple(end_tokens)
            engine.core.add(request)
        await engine.run_until_done()
        for name, (prompt, max_tokens) in prompts.items():
            expected = expected_output(prompt, max_tokens)
            ends = [at for at, token_id in enumerate(expected) if token_id in end_tokens]
            stop = ends[0] + 1 if ends else max_tokens
            assert engine.tokens[name] == expected[:stop], name
            assert engine.finished[name].finish_reason == ("stop" if ends else "length")

    asyncio.run(scenario())


class Countdown:
    """Allows the ids that leave the same remainder as the number of tokens so far, by `modulus`."""

    def __init__(self, modulus: int) -> None:
        self.modulus = modulus
        self.num_tokens = 0

    @property
    def error(self) -> str | None:
        return None

    def allowed(self) -> list[int]:
        return [i for i in range(VOCAB_SIZE) if i % self.modulus == self.num_tokens % self.modulus]

    def allowed_tokens(self) -> np.ndarray:
        bits = np.zeros(-(-VOCAB_SIZE // 32) * 32, np.uint8)
        bits[self.allowed()] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def accept(self, token_id: int) -> None:
        assert token_id in self.allowed()
        self.num_tokens += 1

    def forced_tokens(self) -> list[int]:
        return []


class Refrain(Countdown):
    """Allows any token in the first of each five places, and one alone in the other four."""

    def __init__(self) -> None:
        super().__init__(modulus=5)

    def allowed(self) -> list[int]:
        return self._allowed_at(self.num_tokens)

    def forced_tokens(self) -> list[int]:
        places = range(self.num_tokens, -(-self.num_tokens // 5) * 5)
        return [self._allowed_at(place)[0] for place in places]

    def _allowed_at(self, place: int) -> list[int]:
        return list(ALL_TOKENS) if place % 5 == 0 else [7 * place % VOCAB_SIZE]


def expected_of(prompt: list[int], num_tokens: int, constraint: Countdown | None) -> list[int]:
    """What a request must get, one token at a time."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        allowed = constraint.allowed() if constraint else ALL_TOKENS
        tokens.append(next_token(tokens, allowed))
        if constraint:
            constraint.accept(tokens[-1])
    return tokens[len(prompt) :]


@pytest.mark.parametrize("overlap", [True, False])
async def test_constrained_requests_get_what_their_masks_allow_and_others_all(overlap: bool):
    # Too few pages for all: some are preempted, and go on with their constraints where they were.
    engine = Engine(num_pages=12, context_length=32, disable_overlap_schedule=not overlap)
    moduli = [None, 3, 7, None, 2]
    for index, modulus in enumerate(moduli):
        request = make_request(str(index), [index, 5, 6, 7], max_tokens=14)
        request.constraint = modulus and Countdown(modulus)
        engine.core.add(request)
    await engine.run_until_done()
    assert engine.core.stats.preemptions_total > 0
    for index, modulus in enumerate(moduli):
        oracle = Countdown(modulus) if modulus else None
        assert engine.tokens[str(index)] == expected_of([index, 5, 6, 7], 14, oracle)


async def test_steps_of_constrained_requests_overlap_as_all_others_do():
    engine = Engine()
    request = make_request("constrained", [1, 2, 3], max_tokens=10)
    request.constraint = Countdown(3)
    engine.core.add(request)
    engine.core.add(make_request("free", [4, 5, 6], max_tokens=10))
    seen: list[tuple[int, int]] = []
    execute = engine.device.execute

    def watched(plan: StepPlan) -> asyncio.Future[StepResult]:
        seen.append((plan.step, len(engine.tokens["constrained"])))
        return execute(plan)

    engine.device.execute = watched
    await engine.run_until_done()
    # Both have a token in each step, and each step starts before the tokens of the last are there.
    assert seen == [(step, max(0, step - 1)) for step in range(10)]


@pytest.mark.parametrize("overlap", [True, False])
async def test_tokens_that_must_come_are_computed_together(overlap: bool):
    engine = Engine(disable_overlap_schedule=not overlap)
    request = make_request("refrain", [1, 2, 3], max_tokens=18)
    request.constraint = Refrain()
    engine.core.add(request)
    await engine.run_until_done()
    assert engine.tokens["refrain"] == expected_of([1, 2, 3], 18, Refrain())
    assert engine.core.stats.generated_tokens_total == 18
    # One step for each free token, four, and where the next step starts before a token is there,
    # one more for each.
    assert len(engine.device.plans) == (8 if overlap else 4)


@settings(max_examples=100, deadline=None)
@given(
    workload=st.lists(
        st.tuples(
            st.sampled_from(["free", "countdown", "refrain", "refrain with logprobs"]),
            st.integers(1, 9),  # prompt
            st.integers(1, 20),  # max_tokens
            st.integers(0, 12),  # how much of the output is there from an earlier attempt
        ),
        min_size=1,
        max_size=8,
    ),
    num_pages=st.integers(10, 40),
    overlap=st.booleans(),
    end_tokens=st.sets(st.integers(0, VOCAB_SIZE - 1), max_size=4),
)
def test_forced_tokens_change_nothing_but_the_number_of_steps(
    workload, num_pages, overlap, end_tokens
):
    constraints = {"countdown": lambda: Countdown(3), "free": lambda: None}

    async def scenario() -> None:
        engine = Engine(
            num_pages=num_pages, context_length=32, disable_overlap_schedule=not overlap
        )
        for index, (kind, prompt_len, max_tokens, num_past) in enumerate(workload):
            prompt = [index + 1] * prompt_len
            make = constraints.get(kind, Refrain)
            whole = expected_of(prompt, max_tokens, make())
            ends = [place for place, token in enumerate(whole) if token in end_tokens]
            whole = whole[: ends[0] + 1] if ends else whole
            past = whole[: min(num_past, len(whole) - 1)]
            wants = {"logprobs": 0} if kind == "refrain with logprobs" else {}
            request = make_request(
                str(index),
                prompt + past,
                max_tokens,
                stop_token_ids=tuple(sorted(end_tokens)),
                **wants,
            )
            request.num_prompt_output_tokens = len(past)
            constraint = request.constraint = make()
            for token_id in past if constraint else []:
                constraint.accept(token_id)
            engine.tokens[str(index)] = list(past)
            engine.core.add(request)
            expected[str(index)] = whole
        await engine.run_until_done()
        assert engine.tokens == expected
        for name, output in engine.finished.items():
            is_end = expected[name][-1] in end_tokens
            assert output.finish_reason == ("stop" if is_end else "length")

    expected: dict[str, list[int]] = {}
    asyncio.run(scenario())


async def test_a_plan_does_not_grow_with_the_context():
    engine = Engine(num_pages=700, context_length=600, page_size=1)
    engine.core.add(make_request("long", [1, 2, 3], max_tokens=590))
    await engine.run_until_done()
    decodes = [plan for plan in engine.device.plans if len(plan.decode_slots)]
    sizes = {len(encode(plan)) for plan in decodes}
    # A position, a step and a page's number take one byte more when they pass 127.
    assert len(decodes) == 589
    assert max(sizes) - min(sizes) < 16


async def test_preempted_requests_keep_their_tokens():
    # 9 usable pages of 4 hold 36 tokens; four requests of 4 + 12 tokens want 64.
    engine = Engine(num_pages=10, context_length=32)
    for index in range(4):
        engine.core.add(make_request(str(index), [index, 5, 6, 7], max_tokens=12))
    await engine.run_until_done()
    assert engine.core.stats.preemptions_total > 0
    for index in range(4):
        assert engine.tokens[str(index)] == expected_output([index, 5, 6, 7], 12)


async def test_a_prompt_seen_before_is_computed_only_where_it_differs():
    engine = Engine()
    prompt = list(range(20))
    engine.core.add(make_request("first", [*prompt, 1]))
    await engine.run_until_done()
    engine._all_done.clear()
    engine.core.add(make_request("second", [*prompt, 2]))
    await engine.run_until_done()
    assert engine.finished["first"].num_cached_tokens == 0
    assert engine.finished["second"].num_cached_tokens == 20
    assert engine.tokens["second"] == expected_output([*prompt, 2], 6)


async def test_a_request_that_waits_for_pages_is_hashed_once(monkeypatch: pytest.MonkeyPatch):
    hashed: list[tuple[int, ...]] = []

    def counted(previous: bytes, token_ids: list[int]) -> bytes:
        hashed.append(tuple(token_ids))
        return page_key(previous, token_ids)

    engine = Engine(num_pages=18)
    prompt = list(range(20))
    engine.core.add(make_request("first", [*prompt, 1]))
    await engine.run_until_done()
    engine._all_done.clear()
    # 17 usable pages: 10 and then 13 for the one that runs, 5 cached ones and 2 for the next.
    engine.core.add(make_request("runs", [9] * 40, max_tokens=12))
    engine.core.add(make_request("waits", [*prompt, *[2] * 8]))
    monkeypatch.setattr(scheduler, "page_key", counted)
    await engine.run_until_done()
    assert engine.tokens["waits"] == expected_output([*prompt, *[2] * 8], 6)
    assert hashed.count((0, 1, 2, 3)) == 1


async def test_prompts_with_different_salts_share_nothing():
    engine = Engine()
    for name, salt in (("mine", b"a"), ("theirs", b"b"), ("mine again", b"a")):
        request = make_request(name, list(range(20)))
        request.cache_salt = salt
        engine.core.add(request)
        engine._all_done.clear()
        await engine.run_until_done()
    assert engine.finished["theirs"].num_cached_tokens == 0
    assert engine.finished["mine again"].num_cached_tokens == 16


async def test_choices_of_one_prompt_compute_it_once():
    engine = Engine()
    prompt = list(range(30))
    for choice in range(3):
        engine.core.add(make_request(f"choice {choice}", prompt))
    await engine.run_until_done()
    cached = [engine.finished[f"choice {choice}"].num_cached_tokens for choice in range(3)]
    assert cached == [0, 28, 28]


async def test_decodes_go_on_while_a_long_prompt_is_computed():
    engine = Engine()
    engine.core.add(make_request("short", [1, 2], max_tokens=10))
    engine.core.add(make_request("long", list(range(40)), max_tokens=2))
    await engine.run_until_done()
    mixed = [plan for plan in engine.device.plans if len(plan.decode_slots) and plan.chunks]
    assert len(mixed) >= 4
    assert all(len(chunk.token_ids) <= 8 for plan in mixed for chunk in plan.chunks)


async def test_an_end_token_stops_a_request_and_what_was_planned_after_it_is_dropped():
    prompt = [1, 2, 3]
    expected = expected_output(prompt, 12)
    end = expected[5]
    engine = Engine()
    request = make_request("r", prompt, max_tokens=12)
    request.eos_token_ids = (end,)
    engine.core.add(request)
    await engine.run_until_done()
    stop = expected.index(end) + 1
    assert engine.tokens["r"] == expected[:stop]
    assert engine.finished["r"].finish_reason == "stop"
    assert engine.finished["r"].stop_token_id == end


async def test_pages_of_an_ended_request_are_waited_for_and_nothing_is_computed_anew():
    # 4 usable pages of 4. When the second request stops, a step under way still holds its 2 pages,
    # and the first, now alone, needs its third page for the next step.
    engine = Engine(num_pages=5, context_length=16)
    prompts = {"first": [1, 2, 3, 4], "second": [5, 6, 7, 8]}
    free = expected_output(prompts["second"], 4)
    assert free[3] not in free[:3]
    engine.core.add(make_request("first", prompts["first"], max_tokens=12))
    engine.core.add(
        make_request("second", prompts["second"], max_tokens=12, stop_token_ids=(free[3],))
    )
    await engine.run_until_done()
    assert engine.tokens == {"first": expected_output(prompts["first"], 12), "second": free}
    assert engine.core.stats.preemptions_total == 0


async def test_an_aborted_request_gives_its_pages_back_within_a_step():
    engine = Engine()
    engine.core.add(make_request("gone", list(range(30)), max_tokens=50))
    engine.core.add(make_request("stays", [4], max_tokens=8))
    steps = 0
    take = engine._take

    def abort_at_the_third_token(outputs: list[RequestOutput]) -> None:
        nonlocal steps
        take(outputs)
        if len(engine.tokens["gone"]) == 3:
            engine.core.abort("gone")

    engine.core._on_outputs = abort_at_the_third_token
    await engine.run_until_done()
    assert engine.tokens["gone"] == expected_output(list(range(30)), 3)
    assert engine.tokens["stays"] == expected_output([4], 8)
    assert engine.core._scheduler.pool.num_used == 0


async def test_a_request_continued_elsewhere_counts_its_earlier_output():
    engine = Engine()
    prompt, before = [9, 8, 7], expected_output([9, 8, 7], 4)
    request = make_request("r", prompt + before, max_tokens=10)
    request.num_prompt_output_tokens = 4
    engine.core.add(request)
    engine.tokens["r"] = list(before)
    await engine.run_until_done()
    assert engine.tokens["r"] == expected_output(prompt, 10)


async def test_no_more_of_a_continued_request_is_cached_than_its_prompt_has():
    engine = Engine()
    prompt = [9, 8, 7]
    before = expected_output(prompt, 20)
    engine.core.add(make_request("first", prompt, max_tokens=21))
    await engine.run_until_done()
    request = make_request("second", prompt + before, max_tokens=22)
    request.num_prompt_output_tokens = len(before)
    engine._all_done.clear()
    engine.core.add(request)
    engine.tokens["second"] = list(before)
    await engine.run_until_done()
    assert engine.finished["second"].num_cached_tokens == len(prompt)


async def test_overlapped_and_serial_loops_give_the_same_tokens():
    outputs = []
    for serial in (False, True):
        engine = Engine(num_pages=14, context_length=40, disable_overlap_schedule=serial)
        for index in range(5):
            engine.core.add(make_request(str(index), [index] * (3 + index), max_tokens=9))
        await engine.run_until_done()
        outputs.append(dict(engine.tokens))
    assert outputs[0] == outputs[1]


async def test_a_dead_host_ends_the_loop_with_its_error():
    engine = Engine()
    engine.core._executor = SimulatedDevice(engine.limits, dies_at_step=3)
    engine.core.add(make_request("r", [1], max_tokens=20))
    with pytest.raises(EngineDiedError, match="simulated host"):
        await engine.core.run()


async def test_requests_that_can_never_run_are_refused():
    engine = Engine(context_length=32)
    with pytest.raises(ContextLengthError, match=r"32 tokens.*room for 32"):
        engine.core.add(make_request("long", [1] * 32))
    with pytest.raises(RequestError, match="empty"):
        engine.core.add(make_request("empty", []))
    with pytest.raises(RequestError, match="token id 50"):
        engine.core.add(make_request("alien", [50]))
    engine.core.add(make_request("twice", [1]))
    with pytest.raises(RequestError, match="in use"):
        engine.core.add(make_request("twice", [1]))
    await engine.run_until_done()
    assert list(engine.finished) == ["twice"]


async def test_one_request_more_than_may_wait_is_refused():
    engine = Engine(max_queued_requests=2)
    engine.core.add(make_request("a", [1]))
    engine.core.add(make_request("b", [2]))
    with pytest.raises(EngineBusyError, match="max-queued-requests=2"):
        engine.core.add(make_request("c", [3]))
    await engine.run_until_done()
