"""reasoning_effort: how much a model is to think, in what its template and its grammar know."""

from typing import Any

from cluster.openai.schema import ChatCompletionRequest
from engine.errors import RequestError
from engine.text.reasoning import THINK_START

LOW_EFFORT_TOKENS = 1024
"""Tokens of thinking at most, with little effort; more effort has no bound."""

NO_THINKING = ("none", "minimal")
"""Efforts with which a model does not think at all."""


def thinking_kwargs(body: ChatCompletionRequest, template_source: str) -> dict[str, Any]:
    """What a template is told of thinking; `enable_thinking` goes before `reasoning_effort`.

    Raises:
        RequestError: The model cannot think so much, or so little.
    """
    effort = body.reasoning_effort
    kwargs = {} if body.enable_thinking is None else {"enable_thinking": body.enable_thinking}
    if effort is None:
        return kwargs
    if "reasoning_effort" in template_source:
        return {**kwargs, "reasoning_effort": effort}
    if "enable_thinking" in template_source:
        return {"enable_thinking": effort not in NO_THINKING, **kwargs}
    thinks_always = THINK_START in template_source
    if thinks_always and effort in NO_THINKING:
        raise RequestError(
            f"reasoning_effort is {effort}, but this model always thinks. Set thinking_budget to "
            "the most tokens that it may.",
            param="reasoning_effort",
            code="unsupported_value",
        )
    if not thinks_always and effort not in (*NO_THINKING, "medium"):
        raise RequestError(
            f"reasoning_effort is {effort}, but this model does not think. Leave it out.",
            param="reasoning_effort",
            code="unsupported_value",
        )
    return kwargs


def thinking_budget(body: ChatCompletionRequest, template_source: str) -> int | None:
    """Tokens of thinking at most; None for any number."""
    if body.thinking_budget is not None or "reasoning_effort" in template_source:
        return body.thinking_budget
    return LOW_EFFORT_TOKENS if body.reasoning_effort == "low" else None
