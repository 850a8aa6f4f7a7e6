"""A Ray of the test session's own, and a service over a fake engine, for each test that asks."""

from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, make_service, serve_on_loopback
from openai import AsyncOpenAI
from own_ray import own_ray

from cluster.router import create_app
from cluster.service import OpenAIService


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Ray as `own_ray` makes it."""
    with own_ray():
        yield


@pytest.fixture
def service_fields() -> dict[str, Any]:
    """What `make_service` is given; a file that wants something else has its own."""
    return {}


@pytest.fixture
def service_and_engine(
    tmp_path: Path, service_fields: dict[str, Any]
) -> tuple[OpenAIService, FakeEngine]:
    return make_service(tmp_path, **service_fields)


@pytest.fixture
def service(service_and_engine: tuple[OpenAIService, FakeEngine]) -> OpenAIService:
    return service_and_engine[0]


@pytest.fixture
def engine(service_and_engine: tuple[OpenAIService, FakeEngine]) -> FakeEngine:
    return service_and_engine[1]


@pytest.fixture
async def url(service: OpenAIService) -> AsyncGenerator[str, None]:
    """Where the service is on loopback."""
    async with serve_on_loopback(service) as url:
        yield url


@pytest.fixture
async def client(service: OpenAIService) -> AsyncGenerator[httpx.AsyncClient, None]:
    """A client without a network."""
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        yield client


@pytest.fixture
async def sdk(url: str) -> AsyncGenerator[AsyncOpenAI, None]:
    """OpenAI's own client, over loopback."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk
