"""The page at / and what it reads: before a fake engine over loopback, and in Chromium.

The browser is the machine's own (Debian: `apt-get install chromium`); nothing is downloaded.
"""

import asyncio
import hashlib
import json
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, make_service, serve_on_loopback
from playwright.async_api import Page, async_playwright, expect

from cluster.fleet_page import PUBLIC_PATHS
from cluster.openai.engine_client import EngineInfo, FleetEvent, RankStatus
from cluster.router import create_app
from cluster.service import OpenAIService
from engine.stats import EngineStats

KEY = "sk-of-the-test"
TIMEOUT_MS = 20_000
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
EVENT_TIME_S = 1_700_000_000.0


def _write_keys(directory: Path) -> str:
    file = directory / "keys"
    file.write_text(hashlib.sha256(KEY.encode()).hexdigest() + "\n")
    return str(file)


def _client(service: OpenAIService, root_path: str = "") -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_app(service), root_path=root_path)
    return httpx.AsyncClient(transport=transport, base_url="http://server")


def _busy_fleet(engine: FakeEngine) -> None:
    """Two engines: one that serves with a silent rank's past, and one that starts."""
    stats = EngineStats(
        num_running=3,
        num_waiting=2,
        num_pages=1000,
        num_pages_used=250,
        prompt_tokens_total=4000,
        cached_tokens_total=1000,
        generated_tokens_total=77,
        restarts_total={"silent": 1},
    )
    ranks = tuple(
        RankStatus(rank=rank, state="ready", note=f"host-{rank}", seconds_since_answer=0.2)
        for rank in range(2)
    )
    engine.info = replace(engine.info, engine_id="first", epoch=2, ranks=ranks, stats=stats)
    engine.others = (
        EngineInfo(
            is_ready=False,
            engine_id="second",
            status="weights 40 of 100: model.layers.3",
            ranks=(RankStatus(rank=0, state="weights", note="weights 40 of 100"),),
        ),
    )
    engine.events = (
        FleetEvent(time_s=EVENT_TIME_S, engine_id="first", kind="rebuilt", what="rebuilt, epoch 2"),
    )


async def test_the_fleet_is_told_engine_by_engine(tmp_path: Path) -> None:
    service, engine = make_service(tmp_path)
    _busy_fleet(engine)
    async with _client(service) as client:
        response = await client.get("/fleet")
    fleet = response.json()
    assert response.status_code == 200
    assert (fleet["model"], fleet["is_ready"], fleet["status"]) == ("Tiny/Tiny-Chat", True, "ready")
    first, second = fleet["engines"]
    assert (first["id"], first["epoch"], first["is_ready"]) == ("first", 2, True)
    assert [rank["note"] for rank in first["ranks"]] == ["host-0", "host-1"]
    assert (first["num_running"], first["num_waiting"]) == (3, 2)
    assert (first["num_pages_used"], first["num_pages"]) == (250, 1000)
    assert first["generated_tokens_total"] == 77
    assert first["restarts_total"] == {"silent": 1}
    assert (second["is_ready"], second["status"]) == (False, "weights 40 of 100: model.layers.3")
    [event] = fleet["events"]
    assert event == {
        "time": EVENT_TIME_S,
        "engine": "first",
        "kind": "rebuilt",
        "what": "rebuilt, epoch 2",
    }


async def test_the_page_is_public_and_what_it_reads_is_not(tmp_path: Path) -> None:
    service, _ = make_service(tmp_path, api_key_file=_write_keys(tmp_path))
    async with _client(service) as client:
        for path in PUBLIC_PATHS:
            assert (await client.get(path)).status_code == 200, path
        refused = await client.get("/fleet")
        known = await client.get("/fleet", headers={"Authorization": f"Bearer {KEY}"})
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert known.status_code == 200
        for path in ("/page/", "/page/index.html", "/page/../router.py", "/page/%2e%2e/router.py"):
            assert (await client.get(path)).status_code == 401, path


async def test_the_page_and_its_files_forbid_what_is_not_their_own(tmp_path: Path) -> None:
    service, _ = make_service(tmp_path)
    async with _client(service) as client:
        for path in PUBLIC_PATHS:
            response = await client.get(path)
            policy = response.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "frame-ancestors 'none'" in policy
            assert response.headers["x-content-type-options"] == "nosniff"
            assert "http://" not in response.text.replace("http://www.w3.org/2000/svg", "")
            assert "https://" not in response.text
        assert (await client.get("/page/nothing.js")).status_code == 404


async def test_below_a_route_prefix_the_page_and_health_need_no_key(tmp_path: Path) -> None:
    service, _ = make_service(tmp_path, api_key_file=_write_keys(tmp_path))
    async with _client(service, root_path="/tiny") as client:
        assert (await client.get("/tiny/")).status_code == 200
        assert (await client.get("/tiny/page/fleet.js")).status_code == 200
        assert (await client.get("/tiny/health")).status_code == 200
        assert (await client.get("/tiny/fleet")).status_code == 401
        to_the_page = await client.get("/tiny")
        assert to_the_page.status_code == 307
        assert to_the_page.headers["location"] == "http://server/tiny/"


@pytest.fixture
async def page() -> AsyncIterator[Page]:
    if not CHROMIUM:
        pytest.skip("needs a Chromium on PATH, such as Debian's package chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-background-networking", "--disable-component-update"],
        )
        page = await browser.new_page()
        expect.set_options(timeout=TIMEOUT_MS)
        faults: list[Any] = []
        page.on("pageerror", lambda fault: faults.append(fault))
        yield page
        await browser.close()
    assert not faults


async def test_in_a_browser_the_page_asks_for_a_key_shows_the_fleet_and_chats(
    tmp_path: Path, page: Page
) -> None:
    service, engine = make_service(tmp_path, api_key_file=_write_keys(tmp_path))
    _busy_fleet(engine)
    engine.answer = lambda _: "<b>Once</b> upon a time"
    engine.steps = asyncio.Semaphore(0)
    async with serve_on_loopback(service) as url:
        await page.goto(url)
        await expect(page.locator("#status-text")).to_have_text("The server wants an API key.")
        await page.get_by_label("API key").fill(KEY)
        await page.get_by_role("button", name="Use").click()

        await expect(page.locator("#status-text")).to_contain_text("1 of 2 engines ready")
        first, second = page.locator(".engine").nth(0), page.locator(".engine").nth(1)
        await expect(first).to_contain_text("host-1")
        await expect(first).to_contain_text("25 %")
        await expect(second).to_contain_text("weights 40 of 100: model.layers.3")
        await expect(page.locator("#events")).to_contain_text("rebuilt, epoch 2")
        await expect(page.get_by_label("Model")).to_have_value("Tiny/Tiny-Chat")

        await page.get_by_label("Temperature").fill("0")
        await page.get_by_label("Message").fill("Hello")
        await page.keyboard.press("Enter")
        answer = page.locator(".message.assistant")
        await asyncio.wait_for(engine.has_started.wait(), 10)
        for _ in range(8):
            engine.steps.release()
        # A part is there before the whole is made, and is text, not HTML.
        await expect(answer.locator(".text")).to_contain_text("<b>O")
        await expect(page.get_by_role("button", name="Stop")).to_be_visible()
        for _ in range(200):
            engine.steps.release()
        await expect(answer.locator(".text")).to_have_text("<b>Once</b> upon a time")
        await expect(answer.locator(".note")).to_contain_text("tokens/s")
        assert engine.requests[0].choices[0].sampling.temperature == 0.0

        engine.steps = asyncio.Semaphore(4)
        await page.get_by_label("Message").fill("Go on")
        await page.get_by_role("button", name="Send").click()
        await expect(answer.nth(1).locator(".text")).to_contain_text("<")
        await page.get_by_role("button", name="Stop").click()
        await expect(answer.nth(1).locator(".note")).to_contain_text("Stopped.")
        async with asyncio.timeout(10):
            while len(engine.closed_early) < 1:
                engine.has_closed.clear()
                await engine.has_closed.wait()
    await expect(page.locator("#status-text")).to_contain_text("cannot be reached")
    assert json.loads(await page.evaluate("JSON.stringify(localStorage)")) == {}


class Wire:
    """Carries connections to a server, until they are cut."""

    def __init__(self, url: str) -> None:
        self._host, port = url.removeprefix("http://").split(":")
        self._port = int(port)
        self._writers: set[asyncio.StreamWriter] = set()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection(self._host, self._port)
        self._writers |= {writer, to_writer}
        await asyncio.gather(self._copy(reader, to_writer), self._copy(to_reader, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    def cut(self) -> None:
        """Reset all connections that are open."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()


async def test_in_a_browser_an_answer_goes_on_when_its_connection_breaks(
    tmp_path: Path, page: Page
) -> None:
    service, engine = make_service(tmp_path)
    engine.answer = lambda _: "Once upon a time there was a wire"
    engine.steps = asyncio.Semaphore(6)
    async with serve_on_loopback(service) as server_url:
        wire = Wire(server_url)
        async with await asyncio.start_server(wire.carry, "127.0.0.1", 0) as carrier:
            port = carrier.sockets[0].getsockname()[1]
            await page.goto(f"http://127.0.0.1:{port}")
            await expect(page.get_by_label("Model")).to_have_value("Tiny/Tiny-Chat")
            await page.get_by_label("Message").fill("Tell me a story")
            await page.keyboard.press("Enter")
            answer = page.locator(".message.assistant")
            await expect(answer.locator(".text")).to_contain_text("On")
            wire.cut()
            await expect(answer.locator(".note")).to_contain_text("The connection broke")
            for _ in range(200):
                engine.steps.release()
            await expect(answer.locator(".text")).to_have_text("Once upon a time there was a wire")
            await expect(answer.locator(".note")).to_contain_text("tokens/s")
            await page.goto("about:blank")
            wire.cut()
    assert len(engine.requests) == 2
