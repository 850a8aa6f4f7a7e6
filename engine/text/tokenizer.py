"""Text to token ids, and token ids to bytes.

Reads `tokenizer.json` with the tokenizers library and Qwen1's `qwen.tiktoken` with tiktoken, never
through transformers' AutoTokenizer: that swaps the pre-tokenizer by the model's type, whatever
`tokenizer.json` says. Both kinds are byte-level, so a token is a byte string, and bytes, not text,
are what may be concatenated.

Special tokens that are spelled out in a text are parsed into their ids, as vLLM, SGLang and
transformers do: templates are rendered first and encoded after, and raw prompts need them for
fill-in-the-middle. Text inside a chat message can thus contain control tokens; `find_special` lets
the router see (and count) that.
"""

import base64
import binascii
import json
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import tiktoken
import tokenizers

from engine.errors import CheckpointError, RequestError

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{number}|>" for number in range(205)),
)


class Tokenizer(Protocol):
    """A byte-level tokenizer. Safe to use from several threads.

    Attributes:
        vocab_size: Ids are below it; a model's vocabulary may be padded beyond.
        special_tokens: Control tokens, text to id; they are not shown to clients.
        eos_token: Text of the end token that the checkpoint names, or None.
        bos_token: Text of the begin token that the checkpoint names, or None.
    """

    vocab_size: int
    special_tokens: Mapping[str, int]
    eos_token: str | None
    bos_token: str | None

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Encode `text`, parsing special tokens in it.

        Args:
            add_special_tokens: Frame the text as the checkpoint frames a raw prompt (Qwen's
                tokenizers add nothing); False for rendered chats, which bring their frame.
        """
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for; empty for an id that the tokenizer does not know."""
        ...

    def token_id(self, token: str) -> int | None:
        """Id of a token by its text, or None."""
        ...

    def find_special(self, text: str) -> str | None:
        """The first special token spelled out in `text`, or None."""
        ...


class JsonTokenizer:
    """A byte-level `tokenizer.json`; a `Tokenizer`."""

    def __init__(
        self, path: Path, *, eos_token: str | None = None, bos_token: str | None = None
    ) -> None:
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises bare Exception
            raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from error
        if not _is_byte_level(description):
            raise CheckpointError(
                f"{path} has no byte-level decoder. Qwen's tokenizers are byte-level BPE; others "
                "are not supported. Point --tokenizer-path at a Qwen tokenizer."
            )
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1
        self.special_tokens: Mapping[str, int] = {
            token.content: token_id for token_id, token in added.items() if token.special
        }
        self.eos_token = eos_token
        self.bos_token = bos_token
        self._find_special = _special_pattern(self.special_tokens)
        self._token_bytes = [b""] * self.vocab_size
        for token, token_id in ids.items():
            is_added = token_id in added
            self._token_bytes[token_id] = token.encode() if is_added else _decode_token(token)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def token_bytes(self, token_id: int) -> bytes:
        return self._token_bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def find_special(self, text: str) -> str | None:
        found = self._find_special.search(text)
        return found.group() if found else None


class TiktokenTokenizer:
    """Qwen1's `qwen.tiktoken`; a `Tokenizer`."""

    def __init__(self, path: Path) -> None:
        ranks = _read_ranks(path)
        self.special_tokens: Mapping[str, int] = {
            token: len(ranks) + index for index, token in enumerate(QWEN_SPECIAL_TOKENS)
        }
        self._encoding = tiktoken.Encoding(
            path.name,
            pat_str=QWEN_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self.special_tokens,
        )
        self.vocab_size = len(ranks) + len(QWEN_SPECIAL_TOKENS)
        self.eos_token: str | None = "<|endoftext|>"
        self.bos_token: str | None = None
        self._find_special = _special_pattern(self.special_tokens)
        self._ids = dict(ranks)
        self._ids.update({token.encode(): i for token, i in self.special_tokens.items()})
        self._token_bytes = [b""] * self.vocab_size
        for token, token_id in self._ids.items():
            self._token_bytes[token_id] = token

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        del add_special_tokens  # Qwen1 frames raw prompts with nothing.
        text = unicodedata.normalize("NFC", text)
        try:
            return self._encoding.encode(text, allowed_special="all", disallowed_special=())
        except ValueError as error:  # the pattern gives up on some very long runs
            raise RequestError(f"The tokenizer cannot split this text: {error}") from error

    def token_bytes(self, token_id: int) -> bytes:
        return self._token_bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_id(self, token: str) -> int | None:
        return self._ids.get(token.encode())

    def find_special(self, text: str) -> str | None:
        found = self._find_special.search(text)
        return found.group() if found else None


def load_tokenizer(directory: Path) -> Tokenizer:
    """Load the tokenizer of the checkpoint in `directory`.

    Raises:
        CheckpointError: None lies there, or it is of an unsupported kind.
    """
    path = directory / "tokenizer.json"
    if path.is_file():
        config = read_tokenizer_config(directory)
        return JsonTokenizer(
            path,
            eos_token=_token_text(config.get("eos_token")),
            bos_token=_token_text(config.get("bos_token")),
        )
    path = directory / "qwen.tiktoken"
    if path.is_file():
        return TiktokenTokenizer(path)
    raise CheckpointError(
        f"No tokenizer in {directory}: neither tokenizer.json nor qwen.tiktoken is there. "
        "Say where it lies with --tokenizer-path."
    )


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """Read `tokenizer_config.json`; empty if there is none.

    Raises:
        CheckpointError: It is no JSON object.
    """
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return config


def _token_text(token: Any) -> str | None:
    # Older checkpoints write {"content": "<|im_end|>", "lstrip": false, …} for a plain string.
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _special_pattern(special_tokens: Mapping[str, int]) -> re.Pattern[str]:
    longest_first = sorted(special_tokens, key=len, reverse=True)
    # "(?!)" never matches: a tokenizer may have no special tokens.
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _is_byte_level(description: Mapping[str, Any]) -> bool:
    decoder = description.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    return any(step.get("type") == "ByteLevel" for step in steps)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins: a vocabulary file spells bytes as visible characters.

    Printable bytes stand for themselves; the other 68 are numbered from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


_BYTE_OF_CHARACTER = _byte_of_character()


def _decode_token(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        # A stray entry that is not spelled in the byte alphabet stands for its own text.
        return token.encode()


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error) as error:
                raise CheckpointError(
                    f"{path}, line {number} is not 'base64 rank', as in 'IQ== 0'."
                ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(f"{path} does not number its tokens 0, 1, 2, …: it is incomplete.")
    return ranks
