"""Token ids to text, as they come: no broken characters, no stop string ever shown.

Works on bytes: a character may be spread over several tokens, and is given out when it is whole.
"""

import codecs
from collections import deque
from collections.abc import Sequence

import msgspec

from engine.text.tokenizer import Tokenizer


class TextDelta(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Text that became certain.

    Attributes:
        text: May be empty.
        num_tokens: Tokens, from the first one not reported yet, whose text has been given out
            entirely: their log probabilities may be shown.
    """

    text: str
    num_tokens: int


class Detokenizer:
    """One choice's text.

    Tokens are taken one at a time, so the text does not depend on how a stream was cut into deltas.
    Invariant: `_held` is the longest end of the text so far that a stop string begins with, so it
    is all that may still turn out to be (part of) one:

        text so far   The answer is 42.\\nUs
                      ├─ given out ─────┤├┤ held, as the stop string "\\nUser:" begins so

    Args:
        stop: Strings that end the choice.
        include_stop: Show the stop string, or the stop token, that ended it.
        skip_special_tokens: Leave control tokens out of the text.
        min_tokens: Stop strings are looked for after that many tokens only.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._skipped = frozenset(tokenizer.special_tokens.values() if skip_special_tokens else ())
        self._min_tokens = min_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._num_given_chars = 0
        # For each token not reported yet: length of the text once it is entirely out.
        self._token_ends: deque[int] = deque()
        self.num_tokens = 0
        self.stop_string: str | None = None
        """The stop string that was found; no token may be pushed after it."""

    def push(self, token_id: int) -> TextDelta:
        """Take the next token and give out what is certain by it."""
        assert self.stop_string is None, "the choice has ended"
        token = b"" if token_id in self._skipped else self._tokenizer.token_bytes(token_id)
        self.num_tokens += 1
        self._held += self._decoder.decode(token)
        # An incomplete character will be one char at least, and its token is out when that is.
        is_incomplete = bool(self._decoder.getstate()[0])
        self._token_ends.append(self._num_given_chars + len(self._held) + is_incomplete)
        if not self._stop or self.num_tokens <= self._min_tokens:
            return self._give(len(self._held))
        return self._give_certain()

    def finish(self, stop_token_id: int | None = None) -> TextDelta:
        """End the choice: give out what was held back, an unfinished character as U+FFFD.

        Args:
            stop_token_id: The end token that the engine stopped at, which is not pushed: it is
                shown only if the stop is to be shown and special tokens are not skipped.
        """
        if self.stop_string is not None:
            return TextDelta(text="", num_tokens=0)
        if stop_token_id is not None and self._include_stop and stop_token_id not in self._skipped:
            self._held += self._decoder.decode(self._tokenizer.token_bytes(stop_token_id))
        self._held += self._decoder.decode(b"", final=True)
        return self._give(len(self._held))

    def _give_certain(self) -> TextDelta:
        found = _find_first(self._held, self._stop)
        if found is not None:
            start, self.stop_string = found
            end = start + len(self.stop_string) if self._include_stop else start
            delta = self._give(end)
            self._held = ""
            return delta
        return self._give(len(self._held) - _held_len(self._held, self._stop))

    def _give(self, length: int) -> TextDelta:
        text, self._held = self._held[:length], self._held[length:]
        self._num_given_chars += length
        num_tokens = 0
        while self._token_ends and self._token_ends[0] <= self._num_given_chars:
            self._token_ends.popleft()
            num_tokens += 1
        return TextDelta(text=text, num_tokens=num_tokens)


def _find_first(text: str, stop: Sequence[str]) -> tuple[int, str] | None:
    """Find the stop string that is complete first; of two that end together, the longer one."""
    found = [(start + len(s), start, s) for s in stop if (start := text.find(s)) >= 0]
    if not found:
        return None
    _, start, string = min(found)
    return start, string


def _held_len(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that some stop string begins with."""
    longest = 0
    for string in stop:
        for length in range(min(len(string) - 1, len(text)), longest, -1):
            if text.endswith(string[:length]):
                longest = length
                break
    return longest
