"""The figures, against numpy and against sums done by hand."""

import json
import math

import numpy as np
import pytest

from benchmarks.serving.plot import throughput_over_time
from benchmarks.serving.report import (
    append_json,
    find_faults,
    format_table,
    request_details,
    summarise,
)
from benchmarks.serving.results import Arrival, BenchRequest, RequestResult, deal_tokens

REQUEST = BenchRequest(prompt=[1, 2, 3], prompt_len=3, output_len=4)


def result(*arrivals: tuple[float, int], start_s: float = 0.0, **fields: object) -> RequestResult:
    values = {
        "request": REQUEST,
        "start_s": start_s,
        "latency_s": arrivals[-1][0] if arrivals else 0.0,
        "prompt_len": 3,
        "output_len": sum(count for _, count in arrivals),
        "arrivals": tuple(Arrival(at_s, count) for at_s, count in arrivals),
    }
    return RequestResult(**(values | fields))  # type: ignore[arg-type]


def test_every_token_of_a_burst_is_a_sample_of_its_share_of_the_gap():
    burst = result((0.5, 1), (0.8, 3), (0.9, 1))
    assert burst.itls_s == pytest.approx([0.1, 0.1, 0.1, 0.1])
    assert burst.ttft_s == 0.5
    assert burst.tpot_s == pytest.approx(0.4 / 4)


def test_mean_itl_of_one_request_is_its_tpot_however_the_tokens_are_bundled():
    for arrivals in ([(1.0, 1), (1.1, 1), (1.5, 1), (2.2, 1)], [(1.0, 1), (2.2, 3)]):
        timed = result(*arrivals)
        assert np.mean(timed.itls_s) == pytest.approx(timed.tpot_s)


def test_a_single_token_has_no_tpot_and_a_whole_answer_no_ttft():
    assert result((0.5, 1)).tpot_s is None
    whole = result(output_len=7, latency_s=2.0)
    assert (whole.ttft_s, whole.tpot_s, whole.itls_s) == (None, None, [])


def test_figures_are_numpys_over_all_requests():
    rng = np.random.default_rng(3)
    results = []
    for _ in range(20):
        times = np.cumsum(rng.uniform(0.01, 0.2, size=rng.integers(2, 9)))
        results.append(result(*[(float(at_s), 1) for at_s in times]))
    summary = summarise(results, 10.0)
    ttfts = np.array([r.arrivals[0].at_s for r in results]) * 1e3
    tpots = [(r.latency_s - r.arrivals[0].at_s) / (len(r.arrivals) - 1) * 1e3 for r in results]
    itls = np.concatenate([np.diff([a.at_s for a in r.arrivals]) for r in results]) * 1e3
    latencies = [r.latency_s * 1e3 for r in results]
    for name, values in {
        "ttft": ttfts,
        "tpot": tpots,
        "itl": itls,
        "e2e_latency": latencies,
    }.items():
        assert summary[f"mean_{name}_ms"] == pytest.approx(np.mean(values))
        assert summary[f"median_{name}_ms"] == pytest.approx(np.median(values))
        assert summary[f"std_{name}_ms"] == pytest.approx(np.std(values))
        assert summary[f"p90_{name}_ms"] == pytest.approx(np.percentile(values, 90))
        assert summary[f"p99_{name}_ms"] == pytest.approx(np.percentile(values, 99))
    assert summary["concurrency"] == pytest.approx(sum(latencies) / 1e3 / 10)


def test_throughput_counts_what_succeeded_only():
    results = [result((1.0, 1), (2.0, 3)), result((1.0, 2)), result(error="refused")]
    summary = summarise(results, 4.0)
    assert (summary["completed"], summary["failed"]) == (2, 1)
    assert (summary["total_input_tokens"], summary["total_output_tokens"]) == (6, 6)
    assert summary["request_throughput"] == 0.5
    assert summary["input_throughput"] == summary["output_throughput"] == 1.5
    assert summary["total_throughput"] == 3.0


def test_without_results_the_table_still_prints():
    table = format_table(summarise([], 1.0), {"Backend": "sgl-jax"}).splitlines()
    assert table[0] == "============ Serving Benchmark Result ============"
    assert table[-1] == "=" * 50
    assert "Mean TTFT (ms):                          n/a" in table


def test_the_table_has_the_fields_lines_in_the_fields_columns():
    table = format_table(summarise([result((0.25, 1), (0.75, 1))], 2.0), {}).splitlines()
    assert "Successful requests:                     1" in table
    assert "Output token throughput (tok/s):         1.00" in table
    assert "Median TTFT (ms):                        250.00" in table
    assert "P99 TPOT (ms):                           500.00" in table
    assert "-----Time per Output Token (excl. 1st token)------" in table


@pytest.mark.parametrize(
    ("sizes", "num_tokens", "shares"),
    [
        ([5, 1, 9], 3, [1, 1, 1]),
        ([4, 4, 12], 8, [2, 2, 4]),
        ([7], 4, [4]),
        ([10, 10, 10, 10], 2, [0, 1, 1, 0]),
    ],
)
def test_tokens_are_dealt_to_chunks_by_size_after_one_each(sizes, num_tokens, shares):
    dealt = deal_tokens(sizes, num_tokens)
    assert dealt == shares
    assert sum(dealt) == num_tokens


def test_failures_are_counted_by_message_and_the_commonest_come_first():
    results = [result(error=f"fault {min(number, 4)}") for number in range(8)]
    warnings = find_faults(results, has_exact_output=True, has_exact_input=True)
    assert warnings[0] == "8 of 8 requests failed:"
    assert warnings[1] == "  4 x fault 4"
    assert warnings[-1] == "  and 2 other messages"


def test_usage_that_differs_from_what_was_asked_is_told_once_for_each_kind():
    results = [result((1.0, 4)), result((1.0, 2)), result((1.0, 4), prompt_len=5)]
    warnings = find_faults(results, has_exact_output=True, has_exact_input=True)
    assert len(warnings) == 2
    assert "1 of 3 requests have another prompt length, the first 5 tokens for 3" in warnings[0]
    assert "1 of 3 requests have another output length, the first 2 tokens for 4" in warnings[1]
    assert not find_faults(results, has_exact_output=False, has_exact_input=False)


def test_lines_of_json_are_appended_and_hold_no_infinity(tmp_path):
    path = tmp_path / "out.jsonl"
    results = [result((1.0, 1), (1.5, 2), start_s=8.0), result((2.0, 1), start_s=7.0)]
    for _ in range(2):
        arguments = {"request_rate": math.inf}
        append_json(path, summarise(results, 2.0), arguments, request_details(results))
    first, second = map(json.loads, path.read_text().splitlines())
    assert first == second
    assert first["request_rate"] == "inf"
    assert first["start_times"] == [0.0, 1.0]
    assert first["ttfts"] == [2.0, 1.0]
    assert first["itls"] == [[], [0.25, 0.25]]


def test_throughput_over_time_puts_tokens_into_the_second_in_which_they_came():
    results = [
        result((0.5, 1), (1.25, 4), start_s=100.0),
        result((0.9, 2), start_s=101.0),
        result(start_s=100.5, output_len=7, latency_s=0.25),
    ]
    assert throughput_over_time(results).tolist() == [8, 6]
