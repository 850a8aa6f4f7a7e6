"""What FastAPI does not find out by itself for /openapi.json and /docs: the bodies of requests."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from cluster.openai.responses_schema import ResponseRequest
from cluster.openai.schema import (
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
    ProfileRequest,
)
from cluster.openai.tokenization import DetokenizeRequest, TokenizeRequest

EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""`responses` of a route that may answer with a stream, too."""


def body_reference(kind: type[BaseModel], *, is_required: bool = True) -> dict[str, Any]:
    # Bodies are read raw, so that each fault can be explained in OpenAI's way; FastAPI has to be
    # told of their schema.
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {
        "requestBody": {
            "required": is_required,
            "content": {"application/json": {"schema": schema}},
        }
    }


def body_schemas() -> dict[str, Any]:
    kinds = (
        ChatCompletionRequest,
        CompletionRequest,
        EmbeddingRequest,
        ResponseRequest,
        TokenizeRequest,
        DetokenizeRequest,
        ProfileRequest,
    )
    _, schemas = models_json_schema(
        [(kind, "validation") for kind in kinds],
        ref_template="#/components/schemas/{model}",
    )
    for schema in schemas["$defs"].values():
        for name, field in schema.get("properties", {}).items():
            if name not in schema.get("required", ()):
                schema["properties"][name] = _or_null(field)
    return schemas["$defs"]


def _or_null(field: dict[str, Any]) -> dict[str, Any]:
    """What a field may be, or null: that asks for nothing, whatever the field is."""
    null = {"type": "null"}
    if null in field.get("anyOf", ()):
        return field
    about = {name: field[name] for name in ("title", "description", "default") if name in field}
    rest = {name: value for name, value in field.items() if name not in about}
    return {"anyOf": [rest, null], **about}


def describe_app(
    app: FastAPI, body_schemas: Mapping[str, Any], model_names: Sequence[str]
) -> dict[str, Any]:
    """The app's description, made when it is first asked for.

    Args:
        body_schemas: What `body_schemas` gave; each knows the model's names from here on.
        model_names: Those that the app answers to.
    """
    if app.openapi_schema is None:
        app.openapi_schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        for schema in body_schemas.values():
            name = schema.get("properties", {}).get("model", {})
            for kind in (name, *name.get("anyOf", ())):
                if kind.get("type") == "string":
                    kind["enum"] = list(model_names)
        app.openapi_schema["components"]["schemas"].update(body_schemas)
    return app.openapi_schema
