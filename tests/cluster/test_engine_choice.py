"""Which engine a request goes to."""

import random

from cluster.engine_choice import PREFIX_BLOCK, SEQUENCE_COST, Demand, EngineChooser
from cluster.openai.engine_client import EngineInfo
from engine.stats import EngineStats


def prompt(seed: int, num_blocks: int = 4) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(1000), k=num_blocks * PREFIX_BLOCK))


def ready(num_running: int = 0, epoch: int = 1) -> EngineInfo:
    return EngineInfo(is_ready=True, epoch=epoch, stats=EngineStats(num_running=num_running))


def chooser(**engines: EngineInfo) -> EngineChooser:
    made = EngineChooser()
    for name, info in engines.items():
        made.update(name, info)
    return made


def test_an_idle_engine_comes_before_a_busy_one() -> None:
    busy_first = chooser(a=ready(num_running=3), b=ready())
    assert busy_first.order(Demand.of([prompt(1)])) == ["b", "a"]


def test_a_prompt_goes_where_its_beginning_was_computed() -> None:
    both = chooser(a=ready(), b=ready())
    both.leave(both.enter("b", Demand.of([prompt(1)])))
    longer = prompt(1) + prompt(2)
    assert both.order(Demand.of([longer]))[0] == "b"
    assert both.order(Demand.of([prompt(2)]))[0] == "a", "nothing of it is cached anywhere"


def test_a_cached_beginning_does_not_outweigh_a_long_queue() -> None:
    both = chooser(a=ready(), b=ready())
    both.leave(both.enter("b", Demand.of([prompt(1)])))
    both.update("b", ready(num_running=len(prompt(1)) // SEQUENCE_COST + 1))
    assert both.order(Demand.of([prompt(1)]))[0] == "a"


def test_beginnings_are_forgotten_with_the_hosts_that_held_them() -> None:
    both = chooser(a=ready(), b=ready())
    both.leave(both.enter("b", Demand.of([prompt(1)])))
    both.update("b", ready(epoch=2))
    assert both.order(Demand.of([prompt(1)]))[0] == "a"


def test_tenants_do_not_meet_in_one_cache() -> None:
    both = chooser(a=ready(), b=ready())
    both.leave(both.enter("b", Demand.of([prompt(1)], salt=b"one")))
    assert both.order(Demand.of([prompt(1)], salt=b"one"))[0] == "b"
    assert both.order(Demand.of([prompt(1)], salt=b"other"))[0] == "a"


def test_a_session_stays_with_its_engine_while_that_is_ready() -> None:
    both = chooser(a=ready(), b=ready())
    both.leave(both.enter("b", Demand.of([prompt(1)], session="s")))
    both.update("b", ready(num_running=50))
    assert both.order(Demand.of([prompt(2)], session="s"))[0] == "b"
    both.suspend("b")
    assert both.order(Demand.of([prompt(2)], session="s"))[0] == "a"


def test_engines_that_failed_a_request_come_last() -> None:
    all_three = chooser(a=ready(), b=ready(num_running=9), c=ready(num_running=5))
    assert all_three.order(Demand.of([prompt(1)]), avoided={"a"}) == ["c", "b", "a"]


def test_what_a_router_sends_counts_at_once_and_not_twice() -> None:
    both = chooser(a=ready(), b=ready(num_running=2))
    visits = [both.enter("a", Demand.of([prompt(seed)])) for seed in range(3)]
    assert both.order(Demand.of([prompt(9)]))[0] == "b"
    # The engine tells of the same three.
    both.update("a", ready(num_running=3))
    for visit in visits:
        both.began(visit)
        both.leave(visit)
    assert both.order(Demand.of([prompt(9)]))[0] == "a"


def test_waiting_prompts_count_until_they_begin() -> None:
    both = chooser(a=ready(), b=ready(num_running=2))
    visit = both.enter("a", Demand.of([prompt(1, num_blocks=8)]))
    assert both.order(Demand.of([prompt(2)]))[0] == "b"
    both.began(visit)
    assert both.order(Demand.of([prompt(2)]))[0] == "a"


def test_a_request_that_another_engine_took_counts_there() -> None:
    both = chooser(a=ready(), b=ready())
    visit = both.enter("a", Demand.of([prompt(1)]))
    both.moved(visit, "b")
    assert both.order(Demand.of([prompt(2)]))[0] == "a"
    both.began(visit)
    both.leave(visit)
    assert both.order(Demand.of([prompt(1)]))[0] == "b"


def test_equal_prompts_of_one_request_are_counted_once() -> None:
    demand = Demand.of([prompt(1), prompt(1), prompt(2)])
    assert demand.num_sequences == 3
    assert demand.prompt_lens == (len(prompt(1)), len(prompt(2)))


def test_nothing_is_left_of_requests_that_have_ended() -> None:
    generator = random.Random(0)
    made = chooser(a=ready(), b=ready(), c=ready())
    visits = []
    for step in range(500):
        demand = Demand.of(
            [prompt(generator.randrange(20)) for _ in range(generator.randint(1, 3))]
        )
        visit = made.enter(made.order(demand)[0], demand)
        visits.append(visit)
        if step % 3 == 0:
            made.moved(visit, generator.choice("abc"))
        if step % 2 == 0:
            ending = visits.pop(generator.randrange(len(visits)))
            made.began(ending)
            made.leave(ending)
    for visit in visits:
        made.leave(visit)
    unknown = Demand.of([prompt(999)])
    costs = {name: made.cost(name, unknown) for name in "abc"}
    assert set(costs.values()) == {len(prompt(999))}
