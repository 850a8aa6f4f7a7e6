"""The number of engines that a load asks for: decisions by themselves, and over simulated hours."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.scaling import traces
from benchmarks.scaling.fleet import EngineModel, Run, simulate
from benchmarks.scaling.traces import Trace
from cluster.engine_demand import EngineDemand, FleetLoad, ScalingRules

RULES = ScalingRules(
    min_engines=1,
    max_engines=100,
    num_slots=10,
    target_load=0.8,
    target_queue_delay_s=2.0,
    upscale_delay_s=10.0,
    downscale_delay_s=300.0,
)
MODEL = EngineModel(num_slots=10, num_tokens=10**9, start_s=120)
STEP_S = 1_200.0
# Requests of a trace whose lengths are all alike hold a slot for 12 s.
ENGINES_PER_RATE = 12 / MODEL.num_slots


def even_steps(*engines: float) -> Trace:
    """A load of so many engines' slots, each for a while, that comes without any chance."""
    rates = np.array(engines) / ENGINES_PER_RATE
    shape = traces.steps(rates, STEP_S)
    rng = np.random.default_rng(0)
    return traces.make_trace("steps", shape, STEP_S * len(engines), rng, is_even=True)


def chance_steps(*engines: float, seed: int) -> Trace:
    rates = np.array(engines) / ENGINES_PER_RATE
    shape = traces.steps(rates, STEP_S)
    return traces.make_trace("steps", shape, STEP_S * len(engines), np.random.default_rng(seed))


def change_times(run: Run) -> np.ndarray:
    return np.flatnonzero(np.diff(run.asked)) + 1


def test_a_step_up_or_down_changes_the_number_once() -> None:
    run = simulate(even_steps(2, 8, 3, 6, 1), MODEL, RULES, num_first=3)
    by_step = [run.changes[(change_times(run) // STEP_S) == step].tolist() for step in range(5)]
    signs = [np.sign(changes).tolist() for changes in by_step]
    assert signs == [[], [1], [-1], [1], [-1]]


def test_engines_are_asked_for_within_seconds_of_a_step_and_are_enough() -> None:
    run = simulate(even_steps(2, 8), MODEL, RULES, num_first=3)
    [asked_s] = change_times(run)
    assert asked_s - STEP_S <= RULES.upscale_delay_s + MODEL.report_age_s + 12
    # By arrivals of whole requests in whole seconds, the load may look like 8.1 engines.
    assert run.asked[-1] in (10, 11)
    assert run.delay_s[-100:].max() == 0


def test_fewer_engines_stay_only_after_the_delay() -> None:
    run = simulate(even_steps(8, 2), MODEL, RULES, num_first=10)
    [asked_s] = change_times(run)
    assert RULES.downscale_delay_s <= asked_s - STEP_S <= RULES.downscale_delay_s + 30
    assert run.asked[-1] == math.ceil(2 / (0.8 * 0.75))


@pytest.mark.parametrize("seed", range(4))
def test_a_steady_load_of_chance_arrivals_does_not_make_the_number_swing(seed: int) -> None:
    run = simulate(chance_steps(6, 6, 6, 6, 6, 6, seed=seed), MODEL, RULES, num_first=8)
    assert np.count_nonzero(np.diff(np.sign(run.changes))) <= 1


@pytest.mark.parametrize("seed", range(4))
def test_chance_arrivals_in_steps_turn_the_number_as_often_as_the_steps_turn(seed: int) -> None:
    run = simulate(chance_steps(2, 12, 3, 9, 1, seed=seed), MODEL, RULES, num_first=3)
    turns = np.count_nonzero(np.diff(np.sign(run.changes)))
    assert turns <= 3


@pytest.mark.parametrize("seed", range(3))
def test_bounds_are_kept_whatever_comes(seed: int) -> None:
    rules = replace(RULES, min_engines=2, max_engines=7)
    run = simulate(chance_steps(0, 30, 0, 5, seed=seed), MODEL, rules, num_first=2)
    assert (run.asked.min(), run.asked.max()) == (2, 7)
    run = simulate(chance_steps(0, 30, seed=seed), MODEL, rules, num_first=2, num_possible=4)
    assert run.asked.max() == 4


@pytest.mark.parametrize("seed", range(3))
def test_no_engine_is_stopped_that_running_requests_need(seed: int) -> None:
    run = simulate(chance_steps(9, 4, 7, 1, seed=seed), MODEL, RULES, num_first=9)
    for second in change_times(run):
        if run.asked[second] < run.asked[second - 1]:
            assert run.asked[second] * MODEL.num_slots >= run.running[second]


def test_an_idle_fleet_goes_to_nothing_and_the_next_request_brings_one_back() -> None:
    rules = replace(RULES, min_engines=0)
    run = simulate(even_steps(2, 0, 0.5), MODEL, rules, num_first=3)
    last_busy_s = STEP_S + 12
    [zero_s, *_] = np.flatnonzero(run.asked == 0)
    assert 0 <= zero_s - last_busy_s - RULES.downscale_delay_s <= 30
    back_s = np.flatnonzero(run.asked[zero_s:])[0] + zero_s
    [first_s, *_] = run.trace.arrival_s[run.trace.arrival_s > 2 * STEP_S]
    assert 0 <= back_s - math.floor(first_s) <= 2


def test_pages_count_where_they_are_shorter_than_slots() -> None:
    # A request holds 1,150 tokens on average: two to an engine.
    model = replace(MODEL, num_tokens=2_300)
    run = simulate(even_steps(0.5, 1), model, RULES, num_first=4)
    assert run.asked[-1] == math.ceil(5 / 0.8)


def test_thousands_of_engines_follow_a_load_that_doubles() -> None:
    model = EngineModel(decode_s=0.4, start_s=180)  # Requests of two minutes.
    rules = replace(RULES, num_slots=model.num_slots, max_engines=5_000)
    rate = 64 / 120
    shape = traces.steps(np.array([800, 1_600]) * rate, 900)
    trace = traces.make_trace("many", shape, 1_800, np.random.default_rng(0))
    run = simulate(trace, model, rules, num_first=1_000)
    assert 1_900 <= run.asked.max() <= 2_200
    assert np.all(run.changes > 0)
    assert run.engine_hours < 1.5 * run.oracle_hours


def test_a_recorded_trace_is_served_with_less_than_half_as_much_again_as_the_oracle_needs(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    shape = traces.ramp(2 / ENGINES_PER_RATE, 20 / ENGINES_PER_RATE, 7_200)
    traces.write_csv(traces.make_trace("chat", shape, 7_200, rng), tmp_path / "trace.csv")
    trace = traces.read_csv(tmp_path / "trace.csv")
    run = simulate(trace, MODEL, RULES, num_first=4)
    assert run.turns_per_hour <= 1
    assert run.engine_hours < 1.5 * run.oracle_hours
    assert np.percentile(run.delay_s, 50) == 0


def load(**fields: float) -> FleetLoad:
    return FleetLoad(**{"time_s": 0.0, "num_asked": 2, "num_ready": 2, **fields})  # type: ignore[arg-type]


def decide_for(demand: EngineDemand, seconds: int, known: FleetLoad) -> int:
    """What is decided if a load stays as it is for so long, and is given what it asks for."""
    decided = known.num_asked
    for second in range(seconds):
        now = replace(known, time_s=known.time_s + second)
        decided = demand.decide(now)
        if decided != known.num_asked:
            break
    return decided


def test_a_queue_that_does_not_shrink_asks_for_one_more_though_slots_are_free() -> None:
    # As with prompts so long that computing them is what takes the time.
    slow = load(num_running=8, num_waiting=6, queue_delay_s=9, arrivals_per_s=0.5, service_s=16.0)
    assert decide_for(EngineDemand(RULES), 300, slow) == 3


def test_what_waits_while_engines_start_asks_for_no_more_than_they_are() -> None:
    demand = EngineDemand(RULES)
    served = load(num_running=10, num_waiting=1, arrivals_per_s=2.0, service_s=10.0)
    assert decide_for(demand, 60, served) == 3
    starting = replace(served, time_s=100, num_asked=3, num_waiting=200, queue_delay_s=100)
    assert decide_for(demand, 600, starting) == 3


def test_the_requests_of_an_engine_that_died_start_no_engine() -> None:
    demand = EngineDemand(replace(RULES, min_engines=2))
    steady = load(num_running=12, arrivals_per_s=1.2, service_s=10.0)
    assert decide_for(demand, 30, steady) == 2
    # Six came anew at once, and are counted as arrivals for as long as arrivals are.
    again = replace(
        steady, time_s=30, num_running=10, num_waiting=2, arrivals_per_s=2.0, queue_delay_s=1
    )
    assert decide_for(demand, math.ceil(RULES.arrivals_s), again) == 2


def test_an_engine_that_starts_for_requests_that_have_gone_is_not_stopped_before_it_serves() -> (
    None
):
    demand = EngineDemand(replace(RULES, min_engines=0))
    starting = load(num_asked=1, num_ready=0)
    assert decide_for(demand, 1_000, starting) == 1
    assert decide_for(demand, 290, replace(starting, time_s=1_000, num_ready=1)) == 1
    assert decide_for(demand, 20, replace(starting, time_s=1_290, num_ready=1)) == 0


def test_engines_that_run_stay_when_a_host_has_died() -> None:
    busy = load(num_running=19, num_asked=3, num_ready=2, num_possible=2)
    assert decide_for(EngineDemand(RULES), 400, busy) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TIMESTAMP,ContextTokens\n", "no column GeneratedTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no request"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2026-01-01 00:00:00,ten,1\n", "line 2"),
    ],
)
def test_a_file_that_is_no_trace_says_what_it_lacks(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        traces.read_csv(path)


@pytest.mark.parametrize("moment", ["2023-11-16 18:15:46.6805900", "2024-05-10 00:00:00.009+00:00"])
def test_both_forms_of_the_recorded_moments_are_read(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{moment},7,9\n{moment},8,9\n")
    trace = traces.read_csv(path)
    assert trace.arrival_s.tolist() == [0.0, 0.0]
    assert trace.context.tolist() == [7, 8]
