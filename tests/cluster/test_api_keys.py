"""Which keys are known, and what each may ask for, by a clock that the tests turn."""

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cluster.api_keys import ApiKey, ApiKeys, KeyUses
from engine.errors import AuthenticationError, ConfigError, EngineBusyError

KEY = b"k" * 32


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def uses(clock: Clock, **limits: Any) -> KeyUses:
    return KeyUses(ApiKeys((ApiKey(digest=KEY, **limits),)), clock=clock)


def enter(use: KeyUses, num_tokens: int = 0) -> None:
    with use.enter(KEY) as entered:
        entered.take_tokens(num_tokens)


def test_requests_of_a_minute_flow_back_evenly(clock: Clock) -> None:
    use = uses(clock, requests_per_minute=6)
    for _ in range(6):
        enter(use)
    with pytest.raises(EngineBusyError, match="requests-per-minute=6") as raised:
        enter(use)
    assert raised.value.retry_after_s == pytest.approx(10)
    clock.now_s += 10
    enter(use)
    with pytest.raises(EngineBusyError):
        enter(use)
    clock.now_s += 3600
    for _ in range(6):
        enter(use)
    with pytest.raises(EngineBusyError):
        enter(use)


def test_tokens_past_the_limit_are_paid_for_by_waiting(clock: Clock) -> None:
    use = uses(clock, tokens_per_minute=60)
    enter(use, num_tokens=90)
    with pytest.raises(EngineBusyError, match="tokens-per-minute=60") as raised:
        enter(use)
    assert raised.value.retry_after_s == pytest.approx(31)
    clock.now_s += 31
    enter(use)


def test_requests_under_way_are_bounded_until_they_end(clock: Clock) -> None:
    use = uses(clock, concurrency=2)
    with ExitStack() as running:
        running.enter_context(use.enter(KEY))
        running.enter_context(use.enter(KEY))
        with pytest.raises(EngineBusyError, match=r"2 requests are under way .*concurrency=2"):
            enter(use)
    enter(use)


def test_a_key_whose_line_stays_goes_on_with_what_it_has_used(clock: Clock) -> None:
    key = ApiKey(digest=KEY, requests_per_minute=1)
    use = KeyUses(ApiKeys((key,)), clock=clock)
    enter(use)
    use.change(ApiKeys((key, ApiKey(digest=b"o" * 32))))
    with pytest.raises(EngineBusyError, match="requests-per-minute=1"):
        enter(use)
    use.change(ApiKeys((ApiKey(digest=KEY, requests_per_minute=2),)))
    enter(use)


def test_a_refused_request_costs_nothing(clock: Clock) -> None:
    use = uses(clock, requests_per_minute=1, concurrency=1)
    with use.enter(KEY), pytest.raises(EngineBusyError):
        enter(use)
    clock.now_s += 60
    enter(use)


def test_keys_without_limits_and_no_keys_at_all_are_not_held_up(clock: Clock) -> None:
    use = uses(clock)
    for tenant in (KEY, b""):
        for _ in range(1000):
            with use.enter(tenant) as entered:
                entered.take_tokens(10**6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("secret-key", "line 1 is no SHA-256 hash"),
        ("# nothing", "has no key"),
        ("0" * 64 + " concurrency=0", "line 1: 'concurrency=0' is none of admin"),
        ("# keys\n" + "0" * 64 + " root", "line 2: 'root' is none of admin"),
    ],
)
def test_a_key_file_without_hashes_is_refused_and_not_shown(
    content: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as raised:
        ApiKeys.from_file(path)
    assert "secret-key" not in str(raised.value)


def test_a_key_must_come_as_a_bearer_token() -> None:
    keys = ApiKeys((ApiKey(digest=hashlib.sha256(b"alpha").digest()),))
    keys.check("Bearer alpha")
    keys.check("bearer alpha")
    for header in (None, "", "alpha", "Basic alpha", "Bearer", "Bearer  "):
        with pytest.raises(AuthenticationError):
            keys.check(header)
