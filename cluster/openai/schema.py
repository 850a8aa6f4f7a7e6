"""OpenAI's objects, names verbatim; the extras (top_k, min_p, ignore_eos, …) are named as in vLLM.

Ranges of sampling parameters are `SamplingParams`' business; here are names and types only.

A body is checked in the event loop that carries all streams, so a faulty one must not take longer
than a good one: lists stop at their first fault (`fail_fast`), and the entries of objects are
counted before any of them is looked at.
"""

import reprlib
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    Tag,
    WithJsonSchema,
    model_serializer,
    model_validator,
)
from pydantic_core import from_json

from engine.request import MAX_LOGIT_BIAS, MAX_STOP_TOKENS

# OpenAI's, where a completion names no max_tokens; a chat may fill the context.
DEFAULT_COMPLETION_TOKENS = 16
MAX_CHOICES = 128
MAX_MESSAGES = 8192
MAX_PROMPTS = 16384
MAX_PROFILED_STEPS = 10_000
MAX_FIELDS = 128
MAX_ANSWER_CHOICES = 1024
MAX_TOOLS = 512
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 512

StopReason = Literal["stop", "length"]


def _join_text_parts(content: Any) -> Any:
    """Text of a message's content, which OpenAI also allows to be a list of parts."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError("it must be a string or a list of content parts")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(
                f"part {index} is of type {reprlib.repr(kind)}; this model reads text only, so "
                'every part must be {"type": "text", "text": "…"}'
            )
        if not isinstance(part.get("text"), str):
            raise ValueError(f'part {index} has no string "text"')
        texts.append(part["text"])
    return "\n".join(texts)


def _list_stop_strings(stop: Any) -> Any:
    if stop is None:
        return []
    return [stop] if isinstance(stop, str) else stop


def _list_prompts(prompt: Any) -> Any:
    """A list of prompts, each a string or a list of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(token_id, int) for token_id in prompt):
            return [prompt]
        if len(prompt) > MAX_PROMPTS:
            raise ValueError(f"it has {len(prompt)} prompts; at most {MAX_PROMPTS} may be")
        if all(isinstance(entry, str | list) for entry in prompt):
            return prompt
    raise ValueError(
        "it must be a string, a list of strings, a list of token ids or a list of such lists, and "
        "not empty"
    )


def _count_biases(bias: Any) -> Any:
    if isinstance(bias, dict) and len(bias) > MAX_LOGIT_BIAS:
        raise ValueError(f"it names {len(bias)} tokens; at most {MAX_LOGIT_BIAS} may be")
    return bias


def _read_json(schema: Any) -> Any:
    if not isinstance(schema, str):
        return schema
    try:
        return from_json(schema, allow_inf_nan=False)
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from error


Choices = Annotated[
    list[Annotated[StrictStr, Field(min_length=1)]],
    Field(min_length=1, max_length=MAX_ANSWER_CHOICES, fail_fast=True),
]
MessageContent = Annotated[
    StrictStr | None,
    BeforeValidator(_join_text_parts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                    },
                },
            ]
        }
    ),
]
StopStrings = Annotated[
    list[Annotated[StrictStr, Field(min_length=1, max_length=MAX_STOP_STRING_CHARS)]],
    Field(max_length=MAX_STOP_STRINGS, fail_fast=True),
    BeforeValidator(_list_stop_strings),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
Prompts = Annotated[
    list[StrictStr | Annotated[list[StrictInt], Field(fail_fast=True)]],
    Field(fail_fast=True),
    BeforeValidator(_list_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        }
    ),
]


class RequestObject(BaseModel):
    """An object within a request: no unknown fields, and not too many of them to look at."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _count_fields(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and len(fields) > MAX_FIELDS:
            raise ValueError(f"it has {len(fields)} fields; at most {MAX_FIELDS} may be")
        return fields


class StreamOptions(RequestObject):
    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = False
    """With include_usage: each event counts its choice's tokens so far; as vLLM has it."""
    include_obfuscation: StrictBool = False
    """Accepted; this server pads nothing."""

    @property
    def has_usage_of_choices(self) -> bool:
        return self.include_usage and self.continuous_usage_stats


JsonSchema = dict[str, Any] | StrictBool
# vLLM takes a schema as text, too.
JsonSchemaOrText = Annotated[JsonSchema, BeforeValidator(_read_json)]


class JsonSchemaFormat(RequestObject):
    """`response_format.json_schema`; the name is for the client, and strict is what is done."""

    name: Annotated[StrictStr, Field(max_length=64)] = ""
    description: StrictStr | None = None
    schema_: Annotated[JsonSchema | None, Field(alias="schema")] = None
    strict: StrictBool | None = None


class ResponseFormat(RequestObject):
    """OpenAI's way to say what the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(RequestObject):
    """vLLM's way to say what the answer must look like."""

    json_: Annotated[JsonSchemaOrText | None, Field(alias="json")] = None
    json_object: StrictBool | None = None
    regex: StrictStr | None = None
    choice: Choices | None = None
    grammar: StrictStr | None = None
    whitespace_pattern: StrictStr | None = None


ToolName = Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class FunctionDefinition(RequestObject):
    name: ToolName
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class ToolDefinition(RequestObject):
    """A tool that the model may call; functions are all there are."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(RequestObject):
    name: ToolName


class NamedToolChoice(RequestObject):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(RequestObject):
    mode: Literal["auto", "required"]
    tools: Annotated[
        list[NamedToolChoice], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)
    ]


class AllowedToolsChoice(RequestObject):
    """The model is told of all tools, and may call some."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _kind_of_choice(choice: Any) -> str:
    if isinstance(choice, NamedToolChoice | AllowedToolsChoice):
        return choice.type
    return choice.get("type", "function") if isinstance(choice, dict) else "word"


# By its kind, so that a fault is told of the kind that it is.
ToolChoiceOption = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")]
    | Annotated[NamedToolChoice, Tag("function")]
    | Annotated[AllowedToolsChoice, Tag("allowed_tools")],
    Discriminator(
        _kind_of_choice,
        custom_error_type="unknown_type",
        custom_error_message="its type must be 'function' or 'allowed_tools'",
    ),
]


class PastFunctionCall(RequestObject):
    name: StrictStr
    arguments: StrictStr = "{}"


class PastToolCall(RequestObject):
    """A call in a conversation's past, as this server or another one gave it."""

    id: StrictStr | None = None
    type: Literal["function"] = "function"
    function: PastFunctionCall
    index: StrictInt | None = None


class ChatMessage(RequestObject):
    """A message; the role "function" and `function_call` are OpenAI's older way to call tools."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: MessageContent = None
    name: StrictStr | None = None
    reasoning_content: StrictStr | None = None
    reasoning: StrictStr | None = None
    tool_calls: Annotated[list[PastToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] = []
    tool_call_id: StrictStr | None = None
    function_call: PastFunctionCall | None = None


class _GenerationBody(RequestObject):
    """What both endpoints take. None means: the model's own default, else OpenAI's."""

    model: StrictStr
    max_tokens: StrictInt | None = None
    """By default 16 for a completion, and for a chat all that the context has room for."""
    temperature: StrictFloat | None = None
    top_p: StrictFloat | None = None
    top_k: StrictInt | None = None
    min_p: StrictFloat | None = None
    presence_penalty: StrictFloat | None = None
    frequency_penalty: StrictFloat | None = None
    repetition_penalty: StrictFloat | None = None
    logit_bias: Annotated[dict[str, StrictFloat] | None, BeforeValidator(_count_biases)] = None
    seed: StrictInt | None = None
    stop: StopStrings = []
    stop_token_ids: Annotated[
        list[StrictInt], Field(max_length=MAX_STOP_TOKENS, fail_fast=True)
    ] = []
    include_stop_str_in_output: StrictBool = False
    skip_special_tokens: StrictBool = True
    min_tokens: StrictInt = 0
    ignore_eos: StrictBool = False
    cache_salt: Annotated[StrictStr, Field(min_length=1)] | None = None
    """Requests with different ones share no cached prefix, so that no timing tells of another's."""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchemaOrText | None = None
    guided_regex: StrictStr | None = None
    guided_choice: Choices | None = None
    guided_grammar: StrictStr | None = None
    guided_whitespace_pattern: StrictStr | None = None
    json_schema: JsonSchemaOrText | None = None
    """As SGLang names them: this, `regex` and `ebnf`."""
    regex: StrictStr | None = None
    ebnf: StrictStr | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] = 1
    prompt_logprobs: Annotated[StrictInt, Field(ge=0)] | None = None
    """As vLLM has it: so many alternatives to each token of the prompt."""
    stream: StrictBool = False
    stream_options: StreamOptions | None = None


class ChatCompletionRequest(_GenerationBody):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ]
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool = False
    top_logprobs: StrictInt | None = None
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: StrictBool | None = None
    """By default the assistant's turn is opened, unless its last message is gone on with."""
    continue_final_message: StrictBool = False
    """The answer goes on with the last message, which is the assistant's."""
    tools: Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS, fail_fast=True)] = []
    tool_choice: ToolChoiceOption = "auto"
    parallel_tool_calls: StrictBool = True
    functions: Annotated[list[FunctionDefinition], Field(max_length=MAX_TOOLS, fail_fast=True)] = []
    """OpenAI's older way: the answer may have a `function_call`."""
    function_call: Literal["none", "auto"] | FunctionName = "auto"
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    enable_thinking: StrictBool | None = None
    thinking_budget: Annotated[StrictInt, Field(ge=0)] | None = None
    """Tokens of thinking at most; as Qwen's own service names it."""


class CompletionRequest(_GenerationBody):
    """Body of POST /v1/completions."""

    prompt: Prompts
    logprobs: StrictInt | None = None
    echo: StrictBool = False
    best_of: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    """So many are generated, of which the n likeliest are the answer."""


class EmbeddingRequest(RequestObject):
    """Body of POST /v1/embeddings."""

    model: StrictStr
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = None
    """The first so many, for models that were trained for it."""
    cache_salt: Annotated[StrictStr, Field(min_length=1)] | None = None


class ProfileRequest(RequestObject):
    """Body of POST /start_profile; an empty one will do."""

    num_steps: Annotated[StrictInt, Field(ge=1, le=MAX_PROFILED_STEPS)] = 100


class ProfileStatus(BaseModel):
    """What was asked of every host of one engine; `directory` is on the hosts."""

    num_steps: int
    directory: str


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None = None


class FunctionCall(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(BaseModel):
    """Thoughts go by two names, as clients differ; they and calls are left out where none are."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: FunctionCall | None = None

    @model_serializer(mode="wrap")
    def _leave_out_what_is_not_there(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        optional = ("reasoning_content", "reasoning", "tool_calls", "function_call")
        return {
            name: value
            for name, value in dump(self).items()
            if value is not None or name not in optional
        }


ChatStopReason = StopReason | Literal["tool_calls", "function_call"]


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatStopReason
    stop_reason: int | str | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class FunctionCallDelta(BaseModel):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(BaseModel):
    """A call's beginning, with id and name, or more of its arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallDelta


class ChatDelta(BaseModel):
    """Only what is set is sent."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    function_call: FunctionCallDelta | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatStopReason | None


class ChatCompletionChunk(BaseModel):
    """One event of a stream; the last one before [DONE] has usage and no choices, if asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str | None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: StopReason | None
    stop_reason: int | str | None = None


class Completion(BaseModel):
    """A whole completion, and each event of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    max_model_len: int | None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDescription(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorDescription
