"""When a host that failed is left alone, and for how long."""

from cluster.quarantine import HostRecord

NEW = HostRecord(name="host", failed_at=(), reason="")


def test_second_failure_puts_a_host_in_quarantine_for_a_time() -> None:
    once = NEW.with_failure(1000, "first")
    assert once.quarantine_left_s(1000, 600) == 0
    twice = once.with_failure(1100, "second")
    assert twice.reason == "second"
    assert twice.quarantine_left_s(1100, 600) == 600
    assert twice.quarantine_left_s(1699, 600) == 1
    assert twice.quarantine_left_s(1701, 600) == 0
    assert twice.quarantine_left_s(1100, 0) == 0


def test_host_that_was_tried_again_and_failed_again_goes_back_at_once() -> None:
    twice = NEW.with_failure(1000, "").with_failure(1100, "")
    assert twice.with_failure(1800, "").quarantine_left_s(1800, 600) == 600


def test_failures_of_long_ago_do_not_count() -> None:
    once = NEW.with_failure(1000, "")
    assert not once.is_forgotten(2000)
    assert once.is_forgotten(3000)
    assert once.with_failure(3000, "").quarantine_left_s(3000, 600) == 0
