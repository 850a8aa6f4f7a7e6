"""Events whose text alone changes are the events that pydantic writes."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cluster.openai.schema import ChatChunkChoice, ChatCompletionChunk, ChatDelta
from cluster.openai.sse import TextEvent, encode_event


def make_chunk(text: str, **usage: Any) -> ChatCompletionChunk:
    choice = ChatChunkChoice(
        index=3, delta=ChatDelta(content=text), logprobs=None, finish_reason=None
    )
    return ChatCompletionChunk(
        id="chatcmpl-1",
        object="chat.completion.chunk",
        created=1,
        model='a "name" with \\ in it',
        choices=[choice],
        system_fingerprint=None,
        **usage,
    )


@given(texts=st.lists(st.text(), max_size=4))
def test_a_text_event_is_the_event_that_has_that_text(texts: list[str]) -> None:
    for usage in ({}, {"usage": None}):
        event = TextEvent(lambda text, usage=usage: make_chunk(text, **usage))
        for text in [*texts, 'quotes " and \\ and \n\r\t\0\x7f', "é 日本語 👍 \u2028"]:
            encoded = event.encode(text, "one:5")
            whole = encode_event(make_chunk(text, **usage), "one:5")
            head = b"id: one:5\ndata: "
            for each in (encoded, whole):
                assert each.startswith(head)
                assert each.endswith(b"}\n\n")
                assert each.count(b"\n") == 3
            assert json.loads(encoded[len(head) :]) == json.loads(whole[len(head) :])
