"""Responses as they are kept: to be shown again, and to be gone on with.

Each is kept with its whole conversation, so that it needs no other one. Whoever keeps them sees
bytes; see `cluster/response_shelf.py`.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import msgspec
from pydantic import TypeAdapter

from cluster.openai.response_items import FunctionCallItem, InputItem, MessageItem, ReasoningItem
from cluster.openai.response_output import item_id
from cluster.openai.responses import ResponseCall
from cluster.openai.responses_schema import ENDED, InputItemList, Response, ResponseFailure
from engine.errors import RequestError

MAX_PAGE_ITEMS = 100

_Items = TypeAdapter(list[InputItem])
# The quickest level makes a third of a text; more takes more time than memory is worth.
_COMPRESSION_LEVEL = 1


class StoredResponse(msgspec.Struct, frozen=True, array_like=True):
    """A response, and what it was asked.

    Attributes:
        response_json: The `Response`.
        items_json: The conversation up to it, a list of items; of one that is under way it is in
            the call.
        num_past: So many of those came before its own input.
        has_events: They can be asked for while it is under way.
        call_json: Of one that is under way, the `ResponseCall`; else empty.
        num_restarts: How often it was begun anew.
    """

    response_json: bytes
    items_json: bytes
    num_past: int
    has_events: bool = False
    call_json: bytes = b""
    num_restarts: int = 0

    @classmethod
    def of(
        cls, call: ResponseCall, response: Response, *, num_restarts: int = 0
    ) -> "StoredResponse":
        is_ended = response.status in ENDED
        return cls(
            response.model_dump_json(by_alias=True).encode(),
            _Items.dump_json(call.items, exclude_none=True) if is_ended else b"",
            len(call.past),
            call.body.background and call.body.stream,
            b"" if is_ended else call.model_dump_json(exclude_unset=True, by_alias=True).encode(),
            num_restarts,
        )

    def encode(self) -> bytes:
        """Takes a millisecond for each 100 kB: not for an event loop."""
        return zlib.compress(msgspec.msgpack.encode(self), _COMPRESSION_LEVEL)

    @classmethod
    def decode(cls, encoded: bytes) -> "StoredResponse":
        """What `encode` gave; not for an event loop."""
        return msgspec.msgpack.decode(zlib.decompress(encoded), type=cls)

    def call_to_restart(self) -> ResponseCall | None:
        """What to ask anew where nobody knows what came of it; None if it should not be asked.

        Nothing had come of it, so that nobody has anything of another answer; and once only,
        because it may be the request that whoever ran it has died of.
        """
        status = msgspec.json.decode(self.response_json)["status"]
        if status != "queued" or self.has_events or self.num_restarts:
            return None
        return ResponseCall.model_validate_json(self.call_json)

    def failed(self, failure: ResponseFailure) -> "StoredResponse":
        """The same response, ended by a failure."""
        response = Response.model_validate_json(self.response_json, by_alias=True)
        response = response.model_copy(update={"status": "failed", "error": failure})
        return msgspec.structs.replace(
            self, response_json=response.model_dump_json(by_alias=True).encode()
        )

    def conversation(self) -> list[InputItem]:
        """All that a response which goes on with this one has before its own input."""
        output = msgspec.json.decode(self.response_json)["output"]
        return [*self._items(), *_Items.validate_python(output)]

    def input_items(self) -> list[dict[str, Any]]:
        """The response's own input as clients are shown it, in its order."""
        response_id = msgspec.json.decode(self.response_json)["id"]
        own = self._items()[self.num_past :]
        return [_shown(item, response_id, index) for index, item in enumerate(own)]

    def _items(self) -> list[InputItem]:
        if self.call_json:
            return ResponseCall.model_validate_json(self.call_json).items
        return _Items.validate_json(self.items_json)


def _shown(item: InputItem, response_id: str, index: int) -> dict[str, Any]:
    prefix = "fco"
    if isinstance(item, MessageItem):
        prefix = "msg"
    elif isinstance(item, FunctionCallItem):
        prefix = "fc"
    elif isinstance(item, ReasoningItem):
        prefix = "rs"
    shown = item.model_dump(exclude_none=True)
    shown["id"] = item.id or item_id(prefix, response_id, f"input/{index}")
    shown["status"] = item.status or "completed"
    if isinstance(item, MessageItem) and item.role == "assistant":
        shown["content"] = [
            {"type": "output_text", "text": text, "annotations": []} for text in item.content
        ]
    return shown


def page_of(
    items: Sequence[dict[str, Any]], *, limit: int, is_ascending: bool, after: str | None
) -> InputItemList:
    """A page of input items.

    Args:
        items: All, in their order.
        limit: Most of them.
        is_ascending: Whether the first comes first.
        after: Id of the item behind which the page begins; None for the beginning.

    Raises:
        RequestError: There is no such item.
    """
    ordered = list(items) if is_ascending else list(reversed(items))
    start = 0
    if after is not None:
        places = [place for place, item in enumerate(ordered) if item["id"] == after]
        if not places:
            raise RequestError(f"after is {after[:100]!r}, which is no item here.", param="after")
        start = places[0] + 1
    data = ordered[start : start + limit]
    return InputItemList(
        data=data,
        first_id=data[0]["id"] if data else None,
        last_id=data[-1]["id"] if data else None,
        has_more=start + limit < len(ordered),
    )
