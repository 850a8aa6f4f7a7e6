"""instructor: pydantic models out of a chat, by each of its modes that ask for a form."""

import asyncio
import sys
from collections.abc import Iterable
from typing import Any, Literal

import instructor
import openai
from checks import Checks, Server
from pydantic import BaseModel, Field

check = Checks()
QUESTION: Any = [{"role": "user", "content": "How is the weather in Paris today?"}]


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Paris", "Rome"]
    celsius: int = Field(ge=-20, le=40)


def connect(server: Server, mode: instructor.Mode) -> instructor.Instructor:
    client = openai.OpenAI(base_url=server.url, api_key="EMPTY", max_retries=0, timeout=120)
    return instructor.from_openai(client, mode=mode)


def ask(server: Server, mode: instructor.Mode) -> Weather:
    answer = connect(server, mode).chat.completions.create(
        model=server.model,
        messages=QUESTION,
        response_model=Weather,
        max_retries=0,
        max_tokens=100,
        temperature=0,
    )
    assert isinstance(answer, Weather)
    return answer


@check
def mode_tools(server: Server) -> str:
    return repr(ask(server, instructor.Mode.TOOLS))


@check
def mode_tools_strict(server: Server) -> str:
    return repr(ask(server, instructor.Mode.TOOLS_STRICT))


@check
def mode_json_schema(server: Server) -> str:
    return repr(ask(server, instructor.Mode.JSON_SCHEMA))


@check
def an_answer_is_there_with_what_the_server_sent(server: Server) -> None:
    client = connect(server, instructor.Mode.TOOLS)
    answer, completion = client.chat.completions.create_with_completion(
        model=server.model,
        messages=QUESTION,
        response_model=Weather,
        max_retries=0,
        max_tokens=100,
    )
    assert isinstance(answer, Weather)
    assert completion.usage.completion_tokens > 0


@check
def parts_of_an_answer_come_as_they_are_made(server: Server) -> int:
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        parts = list(
            connect(server, mode).chat.completions.create_partial(
                model=server.model,
                messages=QUESTION,
                response_model=Weather,
                max_retries=0,
                max_tokens=100,
            )
        )
        assert Weather.model_validate(parts[-1].model_dump())
    return len(parts)


@check
def a_list_comes_one_by_one(server: Server) -> int:
    answers = connect(server, instructor.Mode.TOOLS).chat.completions.create(
        model=server.model,
        messages=QUESTION,
        response_model=Iterable[Weather],
        stream=True,
        max_retries=0,
        max_tokens=200,
        temperature=0,
    )
    weathers = list(answers)
    # How many there are is the model's choice, none included.
    assert all(isinstance(each, Weather) for each in weathers)
    return len(weathers)


@check
def the_asynchronous_client(server: Server) -> None:
    async def ask_once() -> Weather:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="EMPTY") as client:
            return await instructor.from_openai(client).chat.completions.create(
                model=server.model,
                messages=QUESTION,
                response_model=Weather,
                max_retries=0,
                max_tokens=100,
            )

    assert isinstance(asyncio.run(ask_once()), Weather)


if __name__ == "__main__":
    sys.exit(check.main())
