"""Plans as people see them."""

from pathlib import Path

from plan_figures import plan_for

from cluster.plan_report import compare_plans, describe_plan, plot_plans
from engine.config import EngineConfig


def test_a_page_names_what_takes_the_memory_and_what_bounds_each_step() -> None:
    page = describe_plan(plan_for(), EngineConfig(model_path="some/model", tp_size=4))
    lines = page.splitlines()
    for said in ("weights", "KV pages", "scratch memory", "code", "free"):
        assert any(line.strip().startswith(said) for line in lines)
    assert "16,000 tokens in 1,000 pages of 16" in page
    (step,) = (line for line in lines if "8 decodes," in line)
    assert "memory" in step
    assert "2,000,000" in step
    assert "none was" in page


def test_slices_are_compared_a_line_each_and_those_that_do_not_work_say_why() -> None:
    page = compare_plans([plan_for()], {"v5e:1x1": "too small. Raise --tp-size."})
    works, fails = page.strip().splitlines()[1:]
    assert works.startswith("v6e:2x2")
    assert "16,000" in works
    assert fails.endswith("Raise --tp-size.")


def test_a_plot_is_drawn_of_any_number_of_plans(tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    plot_plans([plan_for(), plan_for(num_pages=101)], path)
    assert "<svg" in path.read_text()
