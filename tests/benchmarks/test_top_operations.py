import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from benchmarks import top_operations
from benchmarks.top_operations import own_times


def test_time_spent_in_another_operation_is_that_ones():
    events = [(0, 100, "loop"), (10, 40, "product"), (15, 25, "copy"), (40, 60, "product")]
    others = [(100, 130, "sum")]
    assert sorted(own_times([*others, *events])) == [
        ("copy", 10),
        ("loop", 50),
        ("product", 20),
        ("product", 20),
        ("sum", 30),
    ]


def test_operations_of_a_real_trace_come_by_their_shares(tmp_path, monkeypatch, capsys):
    large, small = jnp.ones((1024, 1024)), jnp.ones((8, 8))
    multiply = jax.jit(lambda a, b: (a @ a, jnp.sin(b)))
    jax.block_until_ready(multiply(large, small))
    with jax.profiler.trace(tmp_path):
        jax.block_until_ready(multiply(large, small))
    monkeypatch.setattr("sys.argv", ["top_operations", str(tmp_path), "--top", "1000"])
    assert top_operations.main() == 0
    lines = capsys.readouterr().out.splitlines()
    (trace,) = tmp_path.rglob("*.xplane.pb")
    assert lines[0] == str(trace)
    names = {event for event, _ in top_operations.operations(ProfileData.from_file(str(trace)))}
    assert any("sin" in name for name in names)
    shares = [float(line.split("%")[0]) for line in lines[2:]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=1)


def test_a_folder_without_a_trace_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["top_operations", str(tmp_path)])
    assert top_operations.main() == 2
    assert str(tmp_path) in capsys.readouterr().err
