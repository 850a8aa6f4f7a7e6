"""Calls of tools, read from answers however they are cut, and constrained by grammars."""

import json
from collections.abc import Sequence
from typing import Any

import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import RequestError
from engine.grammar import checked, json_schema_source
from engine.text.answer_parts import (
    AnswerPart,
    AnswerReader,
    CallArguments,
    CallStart,
    Content,
    Reasoning,
)
from engine.text.chat_template import CallHistory
from engine.text.reasoning import PlainReader, ReasoningReader, Thinking
from engine.text.tool_formats import Tool, ToolFormat
from engine.text.tools_hermes import HermesFormat
from engine.text.tools_qwen3_coder import Qwen3CoderFormat
from engine.text.tools_react import ReActFormat, spell_react

WEATHER = Tool(
    name="get_weather",
    description="Tells the weather.",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
        "additionalProperties": False,
    },
)
CLOCK = Tool(
    name="get_time",
    parameters={
        "type": "object",
        "properties": {
            "zone": {"type": "string", "enum": ["UTC", "CET"]},
            "format": {"type": "object", "properties": {"is_24h": {"type": "boolean"}}},
        },
        "required": ["zone"],
    },
)
TOOLS = [WEATHER, CLOCK]


def read(reader: AnswerReader, pieces: Sequence[str]) -> dict[str, Any]:
    """Put an answer together, as a client does."""
    parts: list[AnswerPart] = []
    for piece in pieces:
        parts += reader.push(piece)
    parts += reader.finish()
    calls: list[list[str]] = []
    answer: dict[str, Any] = {"content": "", "reasoning": "", "calls": calls}
    for part in parts:
        match part:
            case Content(text):
                assert text
                answer["content"] += text
            case Reasoning(text):
                assert text
                answer["reasoning"] += text
            case CallStart(index, name):
                assert index == len(calls)
                calls.append([name, ""])
            case CallArguments(index, text):
                assert index == len(calls) - 1
                calls[index][1] += text
    return answer


def answer(content: str = "", calls: Sequence[tuple[str, str]] = (), reasoning: str = "") -> Any:
    return {"content": content, "reasoning": reasoning, "calls": [list(call) for call in calls]}


HERMES = HermesFormat()
CODER = Qwen3CoderFormat()
REACT = ReActFormat()

READ: list[tuple[ToolFormat, str, Any]] = [
    (HERMES, "Just text, 1 < 2.", answer("Just text, 1 < 2.")),
    (
        HERMES,
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        answer(calls=[("get_weather", '{"city": "Paris"}')]),
    ),
    (
        HERMES,
        'Let me see.\n<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "b", "arguments": {"x": ["}", {"y": "\\"{"}]}}\n</tool_call>',
        answer("Let me see.", [("a", "{}"), ("b", '{"x": ["}", {"y": "\\"{"}]}')]),
    ),
    # Not as they were taught, but clear.
    (
        HERMES,
        '<tool_call>{"arguments":{"city":"Paris"},"name":"get_weather"}</tool_call> Done.',
        answer("Done.", [("get_weather", '{"city": "Paris"}')]),
    ),
    (
        HERMES,
        '<tool_call>\n{"name": "a", "arguments": "{\\"x\\": 1}"}\n</tool_call>',
        answer(calls=[("a", '{"x": 1}')]),
    ),
    (
        HERMES,
        '<tool_call>\n{"name": "a", "parameters": {"x": "é"}}\n</tool_call>',
        answer(calls=[("a", '{"x": "é"}')]),
    ),
    # No calls: they stay what they are.
    (HERMES, "<tool_call>\nno JSON\n</tool_call>", answer("<tool_call>\nno JSON\n</tool_call>")),
    (HERMES, '<tool_call>["a"]</tool_call>', answer('<tool_call>["a"]</tool_call>')),
    (HERMES, '<tool_call>{"name": 3}</tool_call>', answer('<tool_call>{"name": 3}</tool_call>')),
    (HERMES, "a <tool_call", answer("a <tool_call")),
    (HERMES, "a\n", answer("a\n")),
    (HERMES, '<tool_call>{"name": "a"', answer('<tool_call>{"name": "a"')),
    # Cut amid its arguments.
    (
        HERMES,
        '<tool_call>\n{"name": "a", "arguments": {"x": "y',
        answer(calls=[("a", '{"x": "y')]),
    ),
    (
        CODER,
        "Sure.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nNew\nYork\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        answer("Sure.", [("get_weather", '{"city": "New\\nYork", "days": 3}')]),
    ),
    (
        CODER,
        '<tool_call>\n<function=get_time>\n<parameter=format>\n{"is_24h": true}\n</parameter>\n'
        "</function>\n</tool_call>\n<tool_call>\n<function=unknown>\n<parameter=n>\n3\n</parameter>"
        "\n</function>\n</tool_call>",
        answer(calls=[("get_time", '{"format": {"is_24h": true}}'), ("unknown", '{"n": "3"}')]),
    ),
    (CODER, "<tool_call>\n<function=f>\n</function>\n</tool_call>", answer(calls=[("f", "{}")])),
    (CODER, "<tool_call>no function</tool_call>!", answer("<tool_call>no function</tool_call>!")),
    (
        CODER,
        "<tool_call>\n<function=get_weather>\n<parameter=days>\nthree\n</parameter>\n</function>",
        answer(calls=[("get_weather", '{"days": "three"}')]),
    ),
    (
        REACT,
        'Thought: I look.\nAction: get_weather\nAction Input: {"city": "Paris"}\n',
        answer("Thought: I look.\n", [("get_weather", '{"city": "Paris"}')]),
    ),
    (
        REACT,
        "Thought: I know.\nFinal Answer: It rains. Action: none",
        answer("Thought: I know.\nIt rains. Action: none"),
    ),
    (REACT, "Action: get_weather\nof Paris", answer("Action: get_weather\nof Paris")),
    (REACT, "Hello, Acti", answer("Hello, Acti")),
]


@pytest.mark.parametrize(("tool_format", "text", "expected"), READ, ids=range(len(READ)))
def test_calls_are_read_however_the_answer_is_cut(
    tool_format: ToolFormat, text: str, expected: Any
) -> None:
    for size in (len(text), 1, 2, 3, 7, 20):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert read(tool_format.reader(TOOLS), pieces) == expected, size


@settings(deadline=None)
@given(st.data())
def test_any_text_without_a_mark_is_content(data: st.DataObject) -> None:
    text = data.draw(st.text(alphabet='<tool_cal>/\n fun=Actio:{}"x', max_size=40))
    if "<tool_call>" in text or "Action:" in text:
        return
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for tool_format in (HERMES, CODER, REACT):
        assert read(tool_format.reader(TOOLS), pieces) == answer(text)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=4), st.integers(1, 9))
def test_arguments_come_as_they_were_written(arguments: dict[str, Any], size: int) -> None:
    written = json.dumps(arguments, ensure_ascii=False)
    text = f'<tool_call>\n{{"name": "f", "arguments": {written}}}\n</tool_call>'
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert read(HERMES.reader([]), pieces) == answer(calls=[("f", written)])


THOUGHTS = [
    ("<think>\nHm.\n</think>\n\nYes.", Thinking.MAY_BEGIN, answer("Yes.", reasoning="Hm.")),
    ("\n<think>\n\n</think>\n\nYes.", Thinking.MAY_BEGIN, answer("Yes.")),
    ("Hm.\n</think>\n\nYes.", Thinking.OPEN, answer("Yes.", reasoning="Hm.")),
    ("\nHm,\n\n1 < 2\n</think>Yes.", Thinking.OPEN, answer("Yes.", reasoning="Hm,\n\n1 < 2")),
    ("No thoughts.", Thinking.MAY_BEGIN, answer("No thoughts.")),
    ("<thin", Thinking.MAY_BEGIN, answer("<thin")),
    ("Cut amid", Thinking.OPEN, answer(reasoning="Cut amid")),
    ("\nand more\n</think>\n\nYes.", Thinking.AMID, answer("Yes.", reasoning="\nand more")),
    ("<think>\nCut </thi", Thinking.MAY_BEGIN, answer(reasoning="Cut </thi")),
    ("a <think>b</think> c", Thinking.MAY_BEGIN, answer("a <think>b</think> c")),
]


@pytest.mark.parametrize(("text", "begin", "expected"), THOUGHTS, ids=range(len(THOUGHTS)))
def test_thoughts_are_read_however_the_answer_is_cut(
    text: str, begin: Thinking, expected: Any
) -> None:
    for size in (len(text), 1, 2, 5):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert read(ReasoningReader(PlainReader(), begin), pieces) == expected, size


def test_calls_may_follow_on_thoughts() -> None:
    text = '<think>\nI look.\n</think>\n\n<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>'
    reader = ReasoningReader(HERMES.reader([]), Thinking.MAY_BEGIN)
    assert read(reader, list(text)) == answer(reasoning="I look.", calls=[("a", "{}")])


def past_call(name: str, call_id: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    written = CallHistory(arguments, json.dumps(arguments))
    return {"id": call_id, "function": {"name": name, "arguments": written}}


@pytest.mark.parametrize("ids", [("1", "2"), ("2", "1"), (None, None)])
def test_qwen1_reads_each_of_several_calls_with_its_own_result(ids: tuple[str | None, ...]) -> None:
    calls = [past_call("get_weather", "1", {"city": "Paris"}), past_call("get_time", "2", {})]
    contents = {"1": "Rain.", "2": "Noon."}
    results: list[dict[str, Any]] = [
        {"role": "tool", "content": contents[call_id or place], "tool_call_id": call_id}
        for place, call_id in zip(("1", "2"), ids, strict=True)
    ]
    conversation = [
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "content": "Thought: I look.\n", "tool_calls": calls},
        *results,
    ]
    written = (
        "Thought: I look.\n"
        'Action: get_weather\nAction Input: {"city": "Paris"}\nObservation: Rain.\n'
        "Action: get_time\nAction Input: {}\nObservation: Noon.\n"
    )
    question, answer = spell_react(conversation, [])
    assert question["content"] == "Well?"
    assert answer == {"role": "assistant", "content": written + "Thought:", "is_open": True}
    [*_, answer, _] = spell_react([*conversation, {"role": "user", "content": "And now?"}], [])
    assert answer == {"role": "assistant", "content": written}


def test_qwen1_reads_calls_without_results_and_results_without_calls() -> None:
    calls = [past_call("get_weather", "1", {"city": "Paris"}), past_call("get_time", "2", {})]
    conversation = [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "Lost.", "tool_call_id": "3"},
        {"role": "tool", "content": "Noon.", "tool_call_id": "2"},
        {"role": "user", "content": "Well?"},
        {"role": "tool", "content": "Stray."},
    ]
    first, _, last = spell_react(conversation, [])
    assert first["content"] == (
        'Action: get_weather\nAction Input: {"city": "Paris"}\n'
        "Action: get_time\nAction Input: {}\nObservation: Noon.\nObservation: Lost.\n"
    )
    assert last["content"] == "Observation: Stray.\nThought:"


class Letters:
    """A vocabulary of single bytes."""

    eos_token_id = 256
    bos_token_id = None
    tokens = [*(bytes([byte]) for byte in range(256)), b"\xff<end>"]  # noqa: RUF012

    def __call__(self, text: bytes) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


def matches(source: str, text: str) -> bool:
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Letters()))
    matcher = llguidance.LLMatcher(tokenizer, checked(source, param="tools"), log_level=0)
    return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()


PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
UTC = '<tool_call>\n{"name": "get_time", "arguments": {"zone": "UTC"}}\n</tool_call>'
MARS = '<tool_call>\n{"name": "get_time", "arguments": {"zone": "Mars"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "get_money", "arguments": {}}\n</tool_call>'
CODER_PARIS = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)
CODER_NOWHERE = (
    "<tool_call>\n<function=get_weather>\n<parameter=days>\n3\n</parameter>\n</function>\n"
    "</tool_call>"
)
REACT_PARIS = 'Thought: I look.\nAction: get_weather\nAction Input: {"city": "Paris"}\n'

CONSTRAINED: list[tuple[ToolFormat, bool, int | None, dict[str, bool]]] = [
    (
        HERMES,
        True,
        None,
        {PARIS: True, f"{PARIS}\n{UTC}": True, MARS: False, OTHER: False, "Hi": False, "": False},
    ),
    (HERMES, True, 1, {PARIS: True, f"{PARIS}\n{UTC}": False}),
    (
        HERMES,
        False,
        None,
        {"Hi": True, "": True, f"Hi.\n{PARIS}": True, f"{PARIS}\n{UTC}": True, f"Hi {MARS}": False},
    ),
    (CODER, True, None, {CODER_PARIS: True, CODER_NOWHERE: False, "Hi": False}),
    (CODER, False, 1, {f"Hi\n{CODER_PARIS}": True, "Hi": True, CODER_NOWHERE: False}),
    (REACT, True, None, {REACT_PARIS: True, "Final Answer: 3": False}),
    (REACT, False, None, {REACT_PARIS: True, "Final Answer: 3": True}),
]


@pytest.mark.parametrize(
    ("tool_format", "is_call_required", "max_calls", "texts"),
    CONSTRAINED,
    ids=[f"{type(row[0]).__name__}-{row[1]}-{row[2]}" for row in CONSTRAINED],
)
def test_grammars_let_through_what_is_a_call_and_nothing_else(
    tool_format: ToolFormat, is_call_required: bool, max_calls: int | None, texts: dict[str, bool]
) -> None:
    source = tool_format.grammar(TOOLS, is_call_required=is_call_required, max_calls=max_calls)
    assert {text: matches(source, text) for text in texts} == texts


@pytest.mark.parametrize(("tool_format", "call"), [(HERMES, PARIS), (CODER, CODER_PARIS)])
def test_text_that_must_have_a_form_has_it_or_there_are_calls(
    tool_format: ToolFormat, call: str
) -> None:
    # Both of llguidance's notations: JSON for schemas, and Lark.
    schema = json_schema_source({"type": "object", "required": ["a"]}, param="")
    for text_source, fits, does_not in ((schema, '{"a": 1}', "{}"), ('start: "yes"', "yes", "no")):
        source = tool_format.grammar(
            TOOLS, is_call_required=False, max_calls=None, text_source=text_source
        )
        texts = {
            fits: True,
            does_not: False,
            call: True,
            f"{call}\n{call}": True,
            f"{fits}\n{call}": False,
            f"{call}\n{fits}": False,
            "": False,
        }
        assert {text: matches(source, text) for text in texts} == texts


def test_a_form_beside_calls_is_refused_where_both_stand_amid_thoughts() -> None:
    with pytest.raises(RequestError, match="ReAct"):
        REACT.grammar(TOOLS, is_call_required=False, max_calls=None, text_source='start: "yes"')
    assert REACT.grammar(TOOLS, is_call_required=True, max_calls=None, text_source='start: "yes"')


@pytest.mark.parametrize("tool_format", [HERMES, CODER])
def test_a_tool_that_says_nothing_of_its_arguments_takes_any(tool_format: ToolFormat) -> None:
    tools = [Tool(name="run", parameters={"type": "object"}), WEATHER]
    source = tool_format.grammar(tools, is_call_required=True, max_calls=None)
    calls = {
        HERMES: '{"name": "run", "arguments": {"command": "ls", "n": 3}}',
        CODER: "<function=run>\n<parameter=command>\nls\n-l\n</parameter>\n<parameter=n>\n3\n"
        "</parameter>\n</function>",
    }
    assert matches(source, f"<tool_call>\n{calls[tool_format]}\n</tool_call>")
    empty = {HERMES: '{"name": "run", "arguments": {}}', CODER: "<function=run>\n</function>"}
    assert matches(source, f"<tool_call>\n{empty[tool_format]}\n</tool_call>")
    assert not matches(source, "<tool_call>\nrun\n</tool_call>")
