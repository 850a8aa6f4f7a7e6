"""Bodies and objects of the Responses API, names verbatim; extras are named as for chats."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_serializer,
)

from cluster.openai.response_items import InputItems, OutputItem
from cluster.openai.schema import (
    MAX_TOOLS,
    FunctionName,
    JsonSchema,
    RequestObject,
    StopStrings,
    StreamOptions,
    ToolName,
)

MAX_METADATA = 16

NO_EFFECT_ON_RESPONSES = frozenset(
    {
        # Of built-in tools, of which there are none.
        "max_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
    }
)
UNSUPPORTED_FOR_RESPONSES: Mapping[str, tuple[Any, ...]] = {
    "context_management": ([],),
    "conversation": (),
    "moderation": (),
    "prompt": (),
}
"""Each with the values that ask for nothing beyond what is done anyway; null always is one."""

INCLUDE_LOGPROBS = "message.output_text.logprobs"


def _check_tools(tools: Any) -> Any:
    for index, tool in enumerate(tools[: MAX_TOOLS + 1] if isinstance(tools, list) else ()):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind != "function":
            raise ValueError(
                f"tool {index} is of type {str(kind)[:40]!r}; this server runs no tools of its "
                'own, so every tool must be of type "function"'
            )
    return tools


class FunctionTool(RequestObject):
    """A function that the model may call, in the flat form of this API."""

    type: Literal["function"]
    name: ToolName
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class FunctionToolName(FunctionName):
    type: Literal["function"]


class AllowedFunctions(RequestObject):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionToolName], Field(max_length=MAX_TOOLS, fail_fast=True)]


class TextFormat(RequestObject):
    """What the answer's text must look like; the name is for the client."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[StrictStr, Field(max_length=64)] | None = None
    description: StrictStr | None = None
    schema_: Annotated[JsonSchema | None, Field(alias="schema")] = None
    strict: StrictBool | None = None

    @model_serializer(mode="wrap")
    def _leave_out_what_is_not_there(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value is not None}


class TextConfig(RequestObject):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningConfig(RequestObject):
    """How much to think; `summary` may be asked for, but nobody writes one."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None


Tools = Annotated[
    list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True), BeforeValidator(_check_tools)
]
MetadataKey = Annotated[StrictStr, Field(max_length=64)]


def _count_metadata(metadata: Any) -> Any:
    if isinstance(metadata, dict) and len(metadata) > MAX_METADATA:
        raise ValueError(f"it has {len(metadata)} entries; at most {MAX_METADATA} may be")
    return metadata


MetadataValue = Annotated[StrictStr, Field(max_length=512)]


class ResponseRequest(RequestObject):
    """Body of POST /v1/responses. None means: the model's own default, else OpenAI's."""

    model: StrictStr
    input: InputItems
    instructions: StrictStr | None = None
    previous_response_id: StrictStr | None = None
    store: StrictBool = True
    background: StrictBool = False
    """Answer at once, and generate whether or not the client stays."""
    truncation: Literal["auto", "disabled"] = "disabled"
    """Whether a conversation that is too long loses its first turns, or is refused."""
    max_output_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    """By default all that the context has room for."""
    text: TextConfig = TextConfig()
    reasoning: ReasoningConfig = ReasoningConfig()
    tools: Tools = Field(default=[])
    tool_choice: Literal["none", "auto", "required"] | FunctionToolName | AllowedFunctions = "auto"
    parallel_tool_calls: StrictBool = True
    include: Annotated[
        list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]],
        Field(max_length=16, fail_fast=True),
    ] = Field(default=[])
    """The latter is accepted, but thoughts come in the clear."""
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], BeforeValidator(_count_metadata)] = Field(
        default={}
    )
    user: StrictStr | None = None
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    # As for chats.
    temperature: StrictFloat | None = None
    top_p: StrictFloat | None = None
    top_k: StrictInt | None = None
    min_p: StrictFloat | None = None
    presence_penalty: StrictFloat | None = None
    frequency_penalty: StrictFloat | None = None
    repetition_penalty: StrictFloat | None = None
    seed: StrictInt | None = None
    stop: StopStrings = Field(default=[])
    cache_salt: Annotated[StrictStr, Field(min_length=1)] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default={})
    enable_thinking: StrictBool | None = None
    thinking_budget: Annotated[StrictInt, Field(ge=0)] | None = None


class InputTokensDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int = 0
    """Nobody pays for what is written into the cache, so it is not counted."""


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"]


class ResponseFailure(BaseModel):
    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


ResponseStatus = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
ENDED: frozenset[ResponseStatus] = frozenset(("completed", "incomplete", "failed", "cancelled"))


class Response(BaseModel):
    """An answer: as far as it has come, or whole."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: ResponseStatus
    background: bool
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None = None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: ReasoningConfig
    service_tier: Literal["default"] = "default"
    store: bool
    temperature: float
    text: TextConfig
    tool_choice: Literal["none", "auto", "required"] | FunctionToolName | AllowedFunctions
    tools: list[FunctionTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None = None
    user: str | None


class DeletedResponse(BaseModel):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class InputItemList(BaseModel):
    """A page of what a response was asked with."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
