"""A chat's messages to the text of its prompt. Knows no token ids and no answers."""

import secrets
from typing import Any, Literal

from cluster.openai.effort import thinking_kwargs
from cluster.openai.schema import ChatCompletionRequest, ChatMessage
from cluster.openai.tools import ToolChoice, past_calls, template_tools
from engine.errors import RequestError
from engine.text.chat_template import ChatMLTemplate, ChatTemplate
from engine.text.tools_react import spell_react

ContinuedPart = Literal["content", "reasoning_content"]

# OpenAI's later and older names of roles that templates know.
_ROLES = {"developer": "system", "function": "tool"}


def render_messages(
    body: ChatCompletionRequest, template: ChatTemplate | None, choice: ToolChoice
) -> str:
    """Write the conversation as the model's prompt.

    Args:
        body: The request.
        template: The model's.
        choice: Which tools the answer may call.

    Raises:
        RequestError: The model knows no conversations, a message has no content, the last message
            cannot be gone on with, or the template refuses them.
    """
    if template is None:
        raise RequestError(
            "This model has no chat template: it is a base model. Use /v1/completions, or start "
            "the server with --chat-template."
        )
    messages = [_template_message(index, each) for index, each in enumerate(body.messages)]
    part = continued_part(body)
    # Where the template writes it the prompt ends, whatever it writes behind the message. It also
    # keeps blanks before it from being trimmed. No message can have it: it is drawn for this one.
    mark = secrets.token_hex(16)
    if part is not None:
        messages[-1][part] += mark
    tools = template_tools(body)
    if isinstance(template, ChatMLTemplate):
        messages, tools = spell_react(messages, choice.tools), []
    text = template.render(
        messages,
        add_generation_prompt=part is None and body.add_generation_prompt is not False,
        kwargs={**body.chat_template_kwargs, **thinking_kwargs(body, template.source)},
        tools=tools,
    )
    if part is None:
        return text
    end = text.rfind(mark)
    if end < 0:
        raise RequestError(
            f"This model's chat template does not write {part} of the last message, which "
            "continue_final_message is to go on with.",
            param="continue_final_message",
        )
    return text[:end]


def continued_part(body: ChatCompletionRequest) -> ContinuedPart | None:
    """What of the last message the answer goes on with: its thoughts, if it has only those.

    Raises:
        RequestError: It is no message that can be gone on with.
    """
    if not body.continue_final_message:
        return None
    param = "continue_final_message"
    if body.add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt cannot both be true: one goes on "
            "with the assistant's last message, the other opens another.",
            param=param,
        )
    last = body.messages[-1]
    if last.role != "assistant":
        raise RequestError(
            "continue_final_message goes on with a message of the assistant, but the last one's "
            f"role is {last.role}.",
            param=param,
        )
    if last.tool_calls or last.function_call is not None:
        raise RequestError(
            "continue_final_message goes on with text, but the last message ends with a call.",
            param=param,
        )
    has_thoughts = bool(last.reasoning_content or last.reasoning)
    return "reasoning_content" if has_thoughts and not last.content else "content"


def _template_message(index: int, message: ChatMessage) -> dict[str, Any]:
    calls = past_calls(message)
    reasoning = message.reasoning_content or message.reasoning
    if message.content is None and not calls and not reasoning:
        raise RequestError(f"messages[{index}] has no content.", param=f"messages[{index}].content")
    role = _ROLES.get(message.role, message.role)
    entry: dict[str, Any] = {"role": role, "content": message.content or ""}
    if message.name is not None:
        entry["name"] = message.name
    if message.tool_call_id is not None:
        entry["tool_call_id"] = message.tool_call_id
    if reasoning is not None:
        entry["reasoning_content"] = reasoning
    if calls:
        entry["tool_calls"] = calls
    return entry
