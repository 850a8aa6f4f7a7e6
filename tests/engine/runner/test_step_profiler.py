from pathlib import Path

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData, StepTraceAnnotation

from engine.runner.step_profiler import StepProfiler

DEADLINE_S = 60.0


def take_steps(profiler: StepProfiler, numbers: range) -> None:
    square = jax.jit(lambda x: x @ x)
    for number in numbers:
        profiler.count_step()
        with StepTraceAnnotation("step", step_num=number):
            square(jnp.ones((8, 8))).block_until_ready()


def traced_steps(directory: Path) -> set[int]:
    return {
        dict(event.stats)["step_num"]
        for path in directory.rglob("*.xplane.pb")
        for plane in ProfileData.from_file(str(path)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "step"
    }


def test_a_trace_holds_the_steps_that_were_asked_for_and_none_before(tmp_path):
    profiler = StepProfiler(tmp_path)
    take_steps(profiler, range(3))
    profiler.start(4)
    assert profiler.wait_until_tracing(DEADLINE_S)
    take_steps(profiler, range(10, 20))
    assert profiler.wait(DEADLINE_S)
    steps = traced_steps(tmp_path)
    assert {10, 11, 12, 13} <= steps
    assert min(steps) == 10


def test_a_trace_can_be_ended_early_and_another_begun(tmp_path):
    profiler = StepProfiler(tmp_path)
    for first in (10, 20):
        profiler.start(1000)
        assert profiler.wait_until_tracing(DEADLINE_S)
        take_steps(profiler, range(first, first + 2))
        profiler.stop()
        assert profiler.wait(DEADLINE_S)
        # JAX names a trace by its second, so the second may have taken the first's place.
        assert {first, first + 1} <= traced_steps(tmp_path)


def test_a_trace_without_steps_ends_by_itself(tmp_path):
    profiler = StepProfiler(tmp_path, max_seconds=0.1)
    profiler.start(5)
    assert profiler.wait(DEADLINE_S)
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_a_trace_that_cannot_be_written_disturbs_no_step(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    profiler = StepProfiler(tmp_path / "file" / "below")
    profiler.start(1)
    assert profiler.wait_until_tracing(DEADLINE_S)
    take_steps(profiler, range(3))
    assert profiler.wait(DEADLINE_S)
    assert "no trace was written" in caplog.text
