"""Random prompts of exact lengths, as token ids or as text that encodes to that many tokens."""

import json
import re
from pathlib import Path

import numpy as np

from benchmarks.serving.errors import BenchmarkError
from engine.errors import CheckpointError
from engine.hub import resolve_checkpoint
from engine.text.tokenizer import Tokenizer, load_tokenizer

DEFAULT_VOCAB_SIZE = 32_000
MIN_WORDS = 100
MAX_ADJUSTMENTS = 50


class PromptMaker:
    """Makes prompts that share no beginning with one another, other than by chance."""

    def __init__(
        self,
        rng: np.random.Generator,
        *,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        wants_text: bool,
        adds_special_tokens: bool = False,
    ) -> None:
        """Prepare the token ids to draw from.

        Args:
            vocab_size: Without a tokenizer, ids are below it.
            wants_text: Give text rather than ids; needs a tokenizer.
            adds_special_tokens: The server frames texts as raw prompts, and that counts.
        """
        if wants_text and tokenizer is None:
            raise BenchmarkError(
                "prompts as text need a tokenizer: say where it lies with --tokenizer, or use a "
                "backend of /v1/completions, which takes token ids."
            )
        self._rng = rng
        self._tokenizer = tokenizer
        self._wants_text = wants_text
        self._adds_special_tokens = adds_special_tokens
        self._ids = _drawable_ids(tokenizer, vocab_size, wants_text=wants_text)

    @property
    def can_encode(self) -> bool:
        return self._tokenizer is not None

    def make(self, num_tokens: int, prefix: list[int] | None = None) -> str | list[int]:
        """Make a prompt of `num_tokens` tokens that begins with `prefix`, from `draw`.

        Raises:
            BenchmarkError: No text of exactly that many tokens was found.
        """
        prefix = prefix or []
        tail = self.draw(num_tokens - len(prefix))
        if not self._wants_text:
            return prefix + tail
        for _ in range(MAX_ADJUSTMENTS):
            text = self._decode(prefix + tail)
            excess = self.count(text) - num_tokens
            if excess == 0:
                return text
            tail = tail[: max(0, len(tail) - excess)] + self.draw(max(0, -excess))
        raise BenchmarkError(
            f"no text of exactly {num_tokens} tokens was found with this tokenizer. Send token ids "
            "instead: --tokenize-prompt."
        )

    def repeat(self, text: str, num_tokens: int) -> str | list[int]:
        """Make a prompt of `num_tokens` tokens out of a text, repeated or cut."""
        ids = self.encode(text)
        repeated = (ids * (num_tokens // max(1, len(ids)) + 1))[:num_tokens]
        if not self._wants_text:
            return repeated
        for _ in range(MAX_ADJUSTMENTS):
            prompt = self._decode(repeated)
            excess = self.count(prompt) - num_tokens
            if excess == 0:
                return prompt
            # What was cut may encode otherwise than it did within the whole.
            repeated = repeated[: max(0, len(repeated) - excess)] + self.draw(max(0, -excess))
        return self.make(num_tokens)

    def draw(self, num_tokens: int) -> list[int]:
        """Draw token ids."""
        return self._rng.choice(self._ids, size=num_tokens).tolist()

    def encode(self, text: str) -> list[int]:
        """Encode a text as the server would, special tokens of a raw prompt included."""
        if self._tokenizer is None:
            raise BenchmarkError(
                "texts cannot be counted without a tokenizer: say where it lies with --tokenizer."
            )
        return self._tokenizer.encode(text, add_special_tokens=self._adds_special_tokens)

    def count(self, text: str) -> int:
        return len(self.encode(text))

    def _decode(self, token_ids: list[int]) -> str:
        assert self._tokenizer is not None
        parts = map(self._tokenizer.token_bytes, token_ids)
        return b"".join(parts).decode(errors="replace")


def find_tokenizer(name: str | None, *directories: str | None) -> Tokenizer | None:
    """Load the tokenizer that was asked for, else one that lies in one of the directories.

    Raises:
        BenchmarkError: `name` was given, and it has no tokenizer that can be read.
    """
    try:
        if name is not None:
            return load_tokenizer(resolve_checkpoint(name, has_weights=False, flag="--tokenizer"))
    except CheckpointError as error:
        raise BenchmarkError(f"--tokenizer={name}: {error}") from error
    for directory in filter(None, directories):
        try:
            return load_tokenizer(Path(directory))
        except CheckpointError:
            continue
    return None


def find_vocab_size(*directories: str | None) -> int:
    """Read the vocabulary's size from a local model's config.json, else assume a small one."""
    for directory in filter(None, directories):
        path = Path(directory) / "config.json"
        if path.is_file():
            size = json.loads(path.read_text(encoding="utf-8")).get("vocab_size")
            if isinstance(size, int):
                return size
    return DEFAULT_VOCAB_SIZE


def _drawable_ids(tokenizer: Tokenizer | None, vocab_size: int, *, wants_text: bool) -> np.ndarray:
    if tokenizer is None:
        # The first ids are control tokens in many vocabularies, and single bytes in others.
        return np.arange(min(1000, vocab_size // 2), vocab_size)
    special = set(tokenizer.special_tokens.values())
    texts = {
        token_id: tokenizer.token_bytes(token_id)
        for token_id in range(tokenizer.vocab_size)
        if token_id not in special and tokenizer.token_bytes(token_id)
    }
    if wants_text:
        # A text of words that are one token each encodes to those very tokens.
        words = [token_id for token_id, text in texts.items() if re.fullmatch(rb" [a-z]+", text)]
        if len(words) < MIN_WORDS:
            words = [token_id for token_id, text in texts.items() if re.fullmatch(rb"[ -~]+", text)]
        texts = dict.fromkeys(words, b"")
    return np.array(list(texts))
