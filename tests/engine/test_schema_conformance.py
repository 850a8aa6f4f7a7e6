"""Two hundred random schemas through a whole engine: what comes is valid, or says that it was cut.

A random model has no idea of JSON: whatever is valid of its answers the grammar has made so.
"""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
from tiny_engine import tiny_engine
from tiny_tokenizer import write_tiny_tokenizer

from engine.grammar import Grammar, json_schema_source
from engine.request import SamplingParams

NUM_SCHEMAS = 200
MAX_DEPTH = 3
NAMES = ("name", "age", "tags", "is_open", "größe", "a b", "x-1", "$id", "")
FORMATS = ("date", "time", "uuid", "ipv4", "email")
PATTERNS = ("^[a-f]{2,4}$", "^(yes|no)$", "^[0-9]{3}-[0-9]{2}$")
VALUES = (None, True, False, 0, -7, 2.5, "", "a", 'say "hi"', "zwölf", [], [1, "a"], {"k": None})


def random_schema(numbers: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema of the kinds that clients send, nested up to `MAX_DEPTH`."""
    makers = [_string, _number, _integer, _enum, _constant, _boolean, _null]
    if depth < MAX_DEPTH:
        makers += [_object, _object, _object, _array, _array, _any_of, _reference]
    return numbers.choice(makers)(numbers, depth)


def _string(numbers: random.Random, depth: int) -> dict[str, Any]:
    kind = numbers.randrange(4)
    if kind == 0:
        return {"type": "string", "format": numbers.choice(FORMATS)}
    if kind == 1:
        return {"type": "string", "pattern": numbers.choice(PATTERNS)}
    low = numbers.randrange(4)
    return {"type": "string", "minLength": low, "maxLength": low + numbers.randrange(6)}


def _number(numbers: random.Random, depth: int) -> dict[str, Any]:
    low = numbers.randrange(-50, 50)
    return {"type": "number", "minimum": low, "maximum": low + numbers.choice([0.5, 3, 1000])}


def _integer(numbers: random.Random, depth: int) -> dict[str, Any]:
    low = numbers.randrange(-50, 50)
    bounds = numbers.choice([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")])
    schema: dict[str, Any] = dict(zip(bounds, (low, low + numbers.randrange(2, 90)), strict=True))
    if numbers.random() < 0.2:
        schema["multipleOf"] = 2
    return {"type": "integer", **schema}


def _enum(numbers: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": numbers.sample(VALUES, numbers.randrange(1, 5))}


def _constant(numbers: random.Random, depth: int) -> dict[str, Any]:
    return {"const": numbers.choice(VALUES)}


def _boolean(numbers: random.Random, depth: int) -> dict[str, Any]:
    return {"type": ["boolean", "null"] if numbers.random() < 0.3 else "boolean"}


def _null(numbers: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "null"}


def _object(numbers: random.Random, depth: int) -> dict[str, Any]:
    names = numbers.sample(NAMES, numbers.randrange(1, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: random_schema(numbers, depth + 1) for name in names},
        "required": [name for name in names if numbers.random() < 0.7],
    }
    others = numbers.randrange(3)
    if others < 2:
        schema["additionalProperties"] = bool(others) and random_schema(numbers, MAX_DEPTH)
    return schema


def _array(numbers: random.Random, depth: int) -> dict[str, Any]:
    low = numbers.randrange(3)
    schema: dict[str, Any] = {
        "type": "array",
        "items": random_schema(numbers, depth + 1),
        "minItems": low,
        "maxItems": low + numbers.randrange(3),
    }
    if numbers.random() < 0.2:
        schema["prefixItems"] = [random_schema(numbers, depth + 1)]
    return schema


def _any_of(numbers: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(numbers, depth + 1) for _ in range(numbers.randrange(1, 4))]}


def _reference(numbers: random.Random, depth: int) -> dict[str, Any]:
    # A list that ends somewhere.
    return {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": _integer(numbers, depth),
                    "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    }


def test_what_comes_of_random_schemas_is_valid_or_says_that_it_was_cut(tmp_path: Path) -> None:
    numbers = random.Random(20)
    schemas = [random_schema(numbers) for _ in range(NUM_SCHEMAS)]
    for schema in schemas:
        _hoist_definitions(schema)
        jsonschema.Draft202012Validator.check_schema(schema)
    with tiny_engine(tokenizer_path=str(write_tiny_tokenizer(tmp_path))) as llm:
        completions = llm.generate(
            [[number % 300 + 3, 7] for number in range(NUM_SCHEMAS)],
            [SamplingParams(seed=number, max_tokens=200) for number in range(NUM_SCHEMAS)],
            grammar=[Grammar(json_schema_source(schema, param="schema")) for schema in schemas],
        )
        assert llm.num_compiles_since_ready == 0
    reasons = Counter(completion.finish_reason for completion in completions)
    assert reasons.keys() <= {"stop", "length"}
    assert reasons["stop"] > NUM_SCHEMAS / 2
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    for schema, completion in zip(schemas, completions, strict=True):
        if completion.finish_reason == "stop":
            value = json.loads(completion.text)
            jsonschema.Draft202012Validator(schema, format_checker=checker).validate(value)
        else:
            assert len(completion.token_ids) == 200


def _hoist_definitions(schema: dict[str, Any]) -> None:
    """Bring the definition of a reference to where it points to."""

    def find(part: Any) -> Any:
        if isinstance(part, dict):
            found = part.pop("$defs", None) if part is not schema else None
            return found or next((one for each in part.values() if (one := find(each))), None)
        if isinstance(part, list):
            return next((one for each in part if (one := find(each))), None)
        return None

    while (definitions := find(schema)) is not None:
        schema.setdefault("$defs", definitions)
