"""What an answer depends on beside the tokens: kept for whoever has to go on with it.

A router that goes on with another one's stream makes the same events from it, heading and all.
"""

from typing import Literal

import msgspec

from cluster.openai.body import parse_body
from cluster.openai.heading import Heading
from cluster.openai.responses import ResponseCall
from cluster.openai.schema import ChatCompletionRequest, CompletionRequest


class Origin(msgspec.Struct, frozen=True, array_like=True):
    """A request as it came, and what its answer began with."""

    kind: Literal["chat", "completion", "response"]
    body_json: bytes
    heading: Heading

    @classmethod
    def of(
        cls, body: ChatCompletionRequest | CompletionRequest | ResponseCall, heading: Heading
    ) -> "Origin":
        """Keep a request and its heading."""
        kind = "chat" if isinstance(body, ChatCompletionRequest) else "completion"
        if isinstance(body, ResponseCall):
            kind = "response"
        return cls(kind, body.model_dump_json(exclude_unset=True, by_alias=True).encode(), heading)

    def body(self) -> ChatCompletionRequest | CompletionRequest | ResponseCall:
        """The request's body, or all that a response was asked with."""
        if self.kind == "response":
            return ResponseCall.model_validate_json(self.body_json)
        if self.kind == "chat":
            return parse_body(ChatCompletionRequest, self.body_json)
        return parse_body(CompletionRequest, self.body_json)

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, encoded: bytes) -> "Origin":
        return msgspec.msgpack.decode(encoded, type=cls)
