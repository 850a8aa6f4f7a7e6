"""Answers that go on with the assistant's last message, against transformers' way of doing it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from chat_templates import LAST_THOUGHTS, TOOLS_AND_THOUGHTS
from fake_engine import FakeEngine, make_service
from tiny_tokenizer import CHAT_TEMPLATE
from transformers.utils.chat_template_utils import render_jinja_template

from cluster.router import create_app

MODEL = "Tiny/Tiny-Chat"
CHAT = "/v1/chat/completions"
QUESTION = {"role": "user", "content": "Tell me a story."}
# One that trims what it writes, and ends turns in its own way.
TRIMMING = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content | trim }} [/end]\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
TEMPLATES = {
    "plain": CHAT_TEMPLATE,
    "tools and thoughts": TOOLS_AND_THOUGHTS,
    "thoughts of the last": LAST_THOUGHTS,
    "trimming": TRIMMING,
}


async def answer(
    folder: Path, template: str | None, messages: list[Any], said: str = " there", **fields: Any
) -> tuple[str, httpx.Response, FakeEngine]:
    """Ask for a continuation; returns the prompt as text and the answer."""
    service, engine = make_service(folder, chat_template_text=template)
    engine.info = replace(engine.info, context_length=4096)
    engine.answer = lambda _: said
    transport = httpx.ASGITransport(create_app(service))
    body = {"model": MODEL, "messages": messages, "continue_final_message": True, **fields}
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        response = await client.post(CHAT, json=body)
    prompt = ""
    if engine.requests:
        token_ids = engine.requests[0].choices[0].prompt_token_ids
        prompt = b"".join(map(engine._tokenizer.token_bytes, token_ids)).decode()
    return prompt, response, engine


def message_of(response: httpx.Response) -> dict[str, Any]:
    [choice] = response.raise_for_status().json()["choices"]
    return choice["message"]


@pytest.mark.parametrize("text", ["Once upon a", "", '{"a": [1,', "One.\n\nTwo", "日本"])
@pytest.mark.parametrize("name", TEMPLATES)
async def test_the_prompt_ends_where_transformers_ends_it(
    name: str, text: str, tmp_path: Path
) -> None:
    messages = [QUESTION, {"role": "assistant", "content": text}]
    [expected], _ = render_jinja_template(
        [messages],
        chat_template=TEMPLATES[name],
        continue_final_message=True,
        bos_token=None,
        eos_token="<|im_end|>",
    )
    # Where a template trims, transformers also trims what stands before an empty message.
    prompt, response, _ = await answer(tmp_path, TEMPLATES[name], messages)
    assert prompt.rstrip() == expected.rstrip()
    assert prompt.endswith(text)
    assert message_of(response)["content"] == " there"


@pytest.mark.parametrize("name", TEMPLATES)
async def test_blanks_at_the_end_of_the_message_are_kept(name: str, tmp_path: Path) -> None:
    messages = [QUESTION, {"role": "assistant", "content": "Once \n"}]
    prompt, _, _ = await answer(tmp_path, TEMPLATES[name], messages, add_generation_prompt=False)
    assert prompt.endswith("Once \n")


async def test_qwen1_goes_on_with_its_last_message(tmp_path: Path) -> None:
    messages = [QUESTION, {"role": "assistant", "content": "Once upon a"}]
    prompt, response, _ = await answer(tmp_path, None, messages)
    assert prompt.endswith(
        "<|im_start|>user\nTell me a story.<|im_end|>\n<|im_start|>assistant\nOnce upon a"
    )
    assert prompt.startswith("<|im_start|>system\n")
    assert message_of(response)["content"] == " there"


async def test_what_follows_on_an_answer_begun_has_no_thoughts(tmp_path: Path) -> None:
    messages = [QUESTION, {"role": "assistant", "content": "I wrote "}]
    said = "<think> in the text.</think>"
    prompt, response, _ = await answer(tmp_path, LAST_THOUGHTS, messages, said)
    assert prompt.endswith("<think>\n\n</think>\n\nI wrote ")
    assert message_of(response) == {"role": "assistant", "content": said, "refusal": None}


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
async def test_a_message_of_thoughts_alone_is_gone_on_with_in_them(
    field: str, tmp_path: Path
) -> None:
    messages = [QUESTION, {"role": "assistant", "content": None, field: "A fox,"}]
    said = "\nor a dog.\n</think>\n\nOnce upon a time"
    prompt, response, _ = await answer(tmp_path, LAST_THOUGHTS, messages, said)
    assert prompt.endswith("<|im_start|>assistant\n<think>\nA fox,")
    message = message_of(response)
    assert message["reasoning_content"] == "\nor a dog."
    assert message["content"] == "Once upon a time"


async def test_thoughts_behind_which_an_answer_has_begun_stay_as_they_are(tmp_path: Path) -> None:
    message = {"role": "assistant", "content": "Once", "reasoning_content": "A fox."}
    prompt, response, _ = await answer(tmp_path, LAST_THOUGHTS, [QUESTION, message])
    assert prompt.endswith("<think>\nA fox.\n</think>\n\nOnce")
    assert message_of(response)["content"] == " there"


async def test_calls_may_follow_on_an_answer_begun(tmp_path: Path) -> None:
    call = '\n<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
    tools = [{"type": "function", "function": {"name": "look"}}]
    messages = [QUESTION, {"role": "assistant", "content": "I look"}]
    _, response, _ = await answer(tmp_path, LAST_THOUGHTS, messages, f" up.{call}", tools=tools)
    message = message_of(response)
    assert message["content"] == " up."
    assert message["tool_calls"][0]["function"] == {"name": "look", "arguments": "{}"}


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"role": "assistant", "content": "I"}, {"add_generation_prompt": True}, "cannot both"),
    ({"role": "user", "content": "I"}, {}, "role is user"),
    (
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "a"}}]},
        {},
        "ends with a call",
    ),
    (
        {"role": "assistant", "content": None, "function_call": {"name": "a"}},
        {},
        "ends with a call",
    ),
    ({"role": "assistant", "content": "I"}, {"guided_regex": "a+"}, "structured output"),
    (
        {"role": "assistant", "content": "I"},
        {
            "tools": [{"type": "function", "function": {"name": "look"}}],
            "tool_choice": "required",
        },
        "structured output",
    ),
]


@pytest.mark.parametrize(("message", "fields", "fault"), REFUSED, ids=range(len(REFUSED)))
async def test_what_cannot_be_gone_on_with_is_refused(
    message: dict[str, Any], fields: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    _, response, engine = await answer(tmp_path, LAST_THOUGHTS, [QUESTION, message], **fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "continue_final_message")
    assert fault in error["message"]
    assert engine.requests == []


async def test_thoughts_of_a_model_that_has_none_are_not_gone_on_with(tmp_path: Path) -> None:
    message = {"role": "assistant", "content": "", "reasoning_content": "A fox,"}
    for template in (CHAT_TEMPLATE, None):
        _, response, _ = await answer(tmp_path, template, [QUESTION, message])
        assert response.status_code == 400
        assert "does not write reasoning_content" in response.json()["error"]["message"]


async def test_a_form_holds_behind_thoughts_that_are_gone_on_with(tmp_path: Path) -> None:
    message = {"role": "assistant", "content": "", "reasoning_content": "A fox,"}
    _, response, engine = await answer(
        tmp_path, LAST_THOUGHTS, [QUESTION, message], "</think>\n\naa", guided_regex="a+"
    )
    assert message_of(response)["content"] == "aa"
    assert engine.requests[0].grammar is not None


async def test_a_turn_is_opened_only_if_that_is_wanted(tmp_path: Path) -> None:
    for wanted, end in ((True, "<|im_start|>assistant\n"), (False, "story.<|im_end|>\n")):
        fields: dict[str, Any] = {"continue_final_message": False, "add_generation_prompt": wanted}
        prompt, response, _ = await answer(tmp_path, CHAT_TEMPLATE, [QUESTION], **fields)
        assert response.status_code == 200
        assert prompt.endswith(end)
