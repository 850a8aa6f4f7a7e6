"""What FastAPI does not find out by itself for /openapi.json and /docs: the bodies of requests."""

from collections.abc import Mapping
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
    return schemas["$defs"]


def describe_app(app: FastAPI, body_schemas: Mapping[str, Any]) -> dict[str, Any]:
    if app.openapi_schema is None:
        app.openapi_schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        app.openapi_schema["components"]["schemas"].update(body_schemas)
    return app.openapi_schema
