"""Whose request it is, and how much each key may ask for: API keys as hashes, with their limits.

Limits are counted in each router by itself: behind N routers a key may have up to N times as much.
"""

import hashlib
import hmac
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.errors import (
    AuthenticationError,
    ConfigError,
    EngineBusyError,
    PermissionDeniedError,
)

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_LIMITS = ("requests-per-minute", "tokens-per-minute", "concurrency")
_MINUTE_S = 60.0
_CONCURRENCY_RETRY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key that is known, and what it may do; a limit that is None does not hold.

    Attributes:
        digest: SHA-256 of the key.
        is_admin: May use what looks into the server, such as the profiler.
        tokens_per_minute: Of prompts and answers together.
        concurrency: Requests under way at a time.
    """

    digest: bytes
    is_admin: bool = False
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None


class ApiKeys:
    """The keys that are known; none means that no key is asked for."""

    def __init__(self, keys: tuple[ApiKey, ...] = ()) -> None:
        self.keys = keys

    @classmethod
    def from_file(cls, path: Path) -> "ApiKeys":
        """Read a file with one key per line: its hexadecimal SHA-256 hash, then what it may do.

        As in `HASH admin` or `HASH requests-per-minute=60 tokens-per-minute=100000 concurrency=8`;
        # begins a comment.

        Raises:
            ConfigError: The file cannot be read, has a line that is none of these, or has no key.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-key-file={path} cannot be read: {error}") from error
        keys = []
        for number, line in enumerate(lines, start=1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            where = f"--api-key-file={path}, line {number}"
            if not _SHA256.fullmatch(words[0]):
                # The line itself is not shown: it may be a key that was not hashed.
                raise ConfigError(
                    f"{where} is no SHA-256 hash (64 hexadecimal digits). Write what "
                    "`printf %s KEY | sha256sum` prints."
                )
            keys.append(_parse_key(words, where))
        if not keys:
            raise ConfigError(f"--api-key-file={path} has no key. Leave the flag out to need none.")
        return cls(tuple(keys))

    @classmethod
    def of(cls, config_file: str | None) -> "ApiKeys":
        """Read `--api-key-file`; without one no key is asked for.

        Raises:
            ConfigError: As `from_file`.
        """
        return cls() if config_file is None else cls.from_file(Path(config_file))

    def check(self, authorization: str | None, *, is_admin_needed: bool = False) -> bytes:
        """Check a request's Authorization header.

        Returns:
            Whose request it is: the key's hash, or nothing where no key is asked for.

        Raises:
            AuthenticationError: Keys are asked for, and this is none of them.
            PermissionDeniedError: An admin's key is needed, and this is another's.
        """
        if not self.keys:
            return b""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise AuthenticationError(
                "You did not provide an API key. Send it as the header Authorization: Bearer KEY."
            )
        digest = hashlib.sha256(key.strip().encode()).digest()
        # All are compared, each in constant time, so that time tells nothing of a near miss.
        matches = [known for known in self.keys if hmac.compare_digest(digest, known.digest)]
        if not matches:
            raise AuthenticationError("Incorrect API key provided.")
        if is_admin_needed and not any(known.is_admin for known in matches):
            raise PermissionDeniedError(
                "This needs an admin's key: one whose line in --api-key-file says admin after the "
                "hash."
            )
        return digest


def _parse_key(words: list[str], where: str) -> ApiKey:
    limits: dict[str, int] = {}
    is_admin = False
    for word in words[1:]:
        name, _, value = word.partition("=")
        if word == "admin":
            is_admin = True
        elif name in _LIMITS and value.isdigit() and int(value) > 0:
            limits[name.replace("-", "_")] = int(value)
        else:
            raise ConfigError(
                f"{where}: {word!r} is none of admin, {', '.join(f'{each}=N' for each in _LIMITS)}"
                ", with N above 0."
            )
    return ApiKey(digest=bytes.fromhex(words[0]), is_admin=is_admin, **limits)


class Allowance:
    """So much a minute, as a bucket that fills evenly and holds a minute's worth.

    Args:
        per_minute: What it holds, and what flows in each minute.
        clock: Monotonic seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._filled_s = clock()

    def seconds_until(self, amount: float) -> float:
        """How long until it holds so much; 0 if it does."""
        now_s = self._clock()
        inflow = (now_s - self._filled_s) * self._per_minute / _MINUTE_S
        self._level = min(self._level + inflow, self._per_minute)
        self._filled_s = now_s
        return max(0.0, (amount - self._level) * _MINUTE_S / self._per_minute)

    def take(self, amount: float) -> None:
        """Take so much, even if it does not hold it: what follows has to wait the longer."""
        self._level -= amount


class KeyUse:
    """What one key has asked of this router lately."""

    def __init__(self, key: ApiKey, clock: Callable[[], float]) -> None:
        self.key = key
        self._num_running = 0
        self._requests = _allowance(key.requests_per_minute, clock)
        self._tokens = _allowance(key.tokens_per_minute, clock)

    def check(self) -> None:
        """Return if one more request is within the key's limits.

        Raises:
            EngineBusyError: It is not yet.
        """
        most = self.key.concurrency
        if most is not None and self._num_running >= most:
            _refuse(f"{self._num_running} requests are under way", "concurrency", most)
        if self._requests is not None and (wait_s := self._requests.seconds_until(1)):
            _refuse(
                "Too many requests", "requests-per-minute", self.key.requests_per_minute, wait_s
            )
        # How many tokens an answer will have nobody knows: it may begin when one is left.
        if self._tokens is not None and (wait_s := self._tokens.seconds_until(1)):
            _refuse("Too many tokens", "tokens-per-minute", self.key.tokens_per_minute, wait_s)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request while it is under way."""
        if self._requests is not None:
            self._requests.take(1)
        self._num_running += 1
        try:
            yield
        finally:
            self._num_running -= 1

    def take_tokens(self, num_tokens: int) -> None:
        """Count tokens of a prompt or an answer."""
        if self._tokens is not None:
            self._tokens.take(num_tokens)


class KeyUses:
    """The use of all keys. Belongs to one event loop.

    Args:
        keys: Those with limits are counted.
        clock: Monotonic seconds.
    """

    def __init__(self, keys: ApiKeys, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._unlimited = KeyUse(ApiKey(digest=b""), clock)
        self._uses: dict[bytes, KeyUse] = {}
        self.change(keys)

    def change(self, keys: ApiKeys) -> None:
        """Count these keys instead. One whose line is the same goes on with what it has used."""
        uses = {}
        for key in keys.keys:
            before = self._uses.get(key.digest)
            is_same = before is not None and before.key == key
            uses[key.digest] = before if is_same else KeyUse(key, self._clock)
        self._uses = uses

    @contextmanager
    def enter(self, tenant: bytes) -> Iterator[KeyUse]:
        """Let a request of a key in, by the key's hash.

        Raises:
            EngineBusyError: The key has used what it may; says which limit, and for how long.
        """
        use = self._uses.get(tenant, self._unlimited)
        use.check()
        with use.request():
            yield use


def _allowance(per_minute: int | None, clock: Callable[[], float]) -> Allowance | None:
    return None if per_minute is None else Allowance(per_minute, clock)


def _refuse(
    what: str, limit: str, most: int | None, retry_after_s: float = _CONCURRENCY_RETRY_S
) -> None:
    raise EngineBusyError(
        f"{what} for this API key: its limit is {limit}={most}. Try again later.",
        retry_after_s=retry_after_s,
    )
