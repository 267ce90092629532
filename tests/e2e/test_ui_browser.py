"""The page at /ui in a real Chromium, driven over its DevTools protocol. Skipped where there is none.

python tests/e2e/test_ui_browser.py URL FOLDER     the screenshots of docs/images, of a running server with the shipped
                                                   model (examples/quickstart.py URL before gives it a tree)
"""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import msgspec
import pytest
import pytest_asyncio

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--remote-debugging-port=0", "--window-size=1280,800"),
]
START_SECONDS = 120.0


class Page:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._last = 0
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.requests: list[str] = []  # addresses that the tab has asked for
        self.errors: list[str] = []  # of its console
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self._socket:
            found = message.json()
            if "id" in found:
                self._answers.pop(found["id"]).set_result(found)
            elif found["method"] == "Network.requestWillBeSent":
                self.requests.append(found["params"]["request"]["url"])
            elif found["method"] == "Runtime.exceptionThrown":
                self.errors.append(str(found["params"]["exceptionDetails"]))
            elif found["method"] == "Log.entryAdded" and found["params"]["entry"]["level"] == "error":
                self.errors.append(found["params"]["entry"]["text"])

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        self._last += 1
        answer = self._answers[self._last] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._last, "method": method, "params": params})
        found = await asyncio.wait_for(answer, START_SECONDS)
        assert "error" not in found, found
        return dict(found["result"])

    async def open(self, url: str) -> None:
        for domain in ("Page", "Network", "Runtime", "Log"):
            await self.send(f"{domain}.enable")
        await self.send("Page.navigate", url=url)

    async def js(self, expression: str) -> Any:
        """The value of an expression; a promise is awaited."""
        found = await self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, condition: str, seconds: float = 120.0) -> Any:
        """Waits until an expression is true; returns its value."""
        deadline = asyncio.get_running_loop().time() + seconds
        while not (found := await self.js(condition)):
            text = await self.js("document.body ? document.body.innerText.slice(0, 2000) : 0")
            assert asyncio.get_running_loop().time() < deadline, f"{condition} is still false; the page says:\n{text}"
            await asyncio.sleep(0.05)
        return found

    async def text(self) -> str:
        return str(await self.js("document.body.innerText"))

    async def type(self, selector: str, text: str) -> None:
        """Writes into a field and presses Enter."""
        await self.js(f"document.querySelector({selector!r}).focus()")
        await self.send("Input.insertText", text=text)
        await self.press("Enter")

    async def press(self, name: str) -> None:
        """Presses and releases a key where the focus is."""
        code = {"Enter": 13, "Tab": 9, "Escape": 27, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}[name]
        key = {"key": name, "code": name, "windowsVirtualKeyCode": code}
        await self.send("Input.dispatchKeyEvent", type="keyDown", text="\r" if name == "Enter" else "", **key)
        await self.send("Input.dispatchKeyEvent", type="keyUp", **key)

    async def screenshot(self, path: Path) -> None:
        """The part of the window that the page fills."""
        height = await self.js("Math.min(innerHeight, document.getElementById('app').getBoundingClientRect().bottom)")
        clip = {"x": 0, "y": 0, "width": await self.js("innerWidth"), "height": height, "scale": 1}
        found = await self.send("Page.captureScreenshot", format="png", clip=clip)
        path.write_bytes(base64.b64decode(found["data"]))

    async def close(self) -> None:
        self._reader.cancel()
        await self._socket.close()


@asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Page]:
    """A tab of a new browser, whose profile is in ``folder``."""
    assert PROGRAM is not None
    command = [PROGRAM, *_FLAGS, f"--user-data-dir={folder}", "about:blank"]
    # Its sockets' folder, which it does not remove when it is terminated. A short path: sockets have at most 107 bytes.
    temporary = tempfile.mkdtemp(prefix="chromium-")
    environment = {**os.environ, "TMPDIR": temporary}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        ready = folder / "DevToolsActivePort"
        async with asyncio.timeout(START_SECONDS):
            while not ready.exists() or len(ready.read_text().splitlines()) < 2:
                await asyncio.sleep(0.05)
        address = f"http://127.0.0.1:{ready.read_text().splitlines()[0]}"
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{address}/json/list") as response:
                tab = next(each for each in await response.json() if each["type"] == "page")
            socket = await session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=64 << 20)
            page = Page(socket)
            try:
                yield page
            finally:
                await page.close()
    finally:
        process.terminate()
        try:
            await asyncio.to_thread(process.wait, 60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(temporary, ignore_errors=True)


@pytest_asyncio.fixture(loop_scope="function")
async def page(tmp_path: Path) -> AsyncIterator[Page]:
    if PROGRAM is None:
        pytest.skip("no Chromium here")
    async with browser(tmp_path) as tab:
        yield tab


async def show(page: Page, server: Any, view: str = "tree") -> None:
    await page.open(f"{server.url}/ui#{view}")
    await page.until("!!document.querySelector('.state.live')")


async def send(page: Page, message: str, answers: int = 1) -> None:
    await page.type(".say textarea", message)
    done = f"document.querySelectorAll('#app small').length >= {answers} && !document.body.innerText.includes('▍')"
    await page.until(done)


def complete(server: Any, prompt: str, **fields: Any) -> None:
    body = {"prompt": prompt, "max_tokens": 8, **fields}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text


def fill(url: str, first: int, last: int) -> None:
    """Caches prompts of one page of four tokens each: a node each."""
    prompts = [[1 + i // 64 % 64, 1 + i % 64, 1 + i // 4096, 3] for i in range(first, last)]
    answer = httpx.post(f"{url}/cache/warm", json={"prompts": prompts}, timeout=120)
    assert answer.status_code == 200, answer.text


async def test_the_tree_follows_traffic(page: Page, start_server: Callable[..., Any]) -> None:
    server = start_server()
    await show(page, server)
    assert "0 tokens cached" in await page.text()
    await asyncio.to_thread(complete, server, "something that is long enough for several pages of tokens " * 4)
    await page.until("[...document.querySelectorAll('.cell')].some((each) => each.innerText.includes('something'))")
    await page.js(
        "[...document.querySelectorAll('.cell')].find((each) => each.innerText.includes('something')).click()"
    )
    await page.until(
        "document.querySelector('aside') && document.querySelector('aside').innerText.includes('evictable')"
    )
    # All of its text, and the next request that stops in it, with what it went on with.
    prompt = "something that is long enough for several pages of tokens " * 3 + "and then another end of it"
    await asyncio.to_thread(complete, server, prompt)
    await page.until("[...document.querySelectorAll('.cell')].some((each) => each.innerText.includes('omething'))")
    # The click before may have chosen this node: another one would close it.
    await page.js(
        "[...document.querySelectorAll('.cell:not(.chosen)')]"
        ".find((each) => each.innerText.includes('something'))?.click()"
    )
    full = await page.until("document.querySelector('.full') && document.querySelector('.full').innerText")
    assert "several pages" in full
    for cell in range(await page.js("document.querySelectorAll('button.cell').length")):
        await page.js(
            f"(each => each.matches('.chosen') || each.click())(document.querySelectorAll('button.cell')[{cell}])"
        )
        await asyncio.sleep(0.3)
        if "another" in await page.js("[...document.querySelectorAll('.stops')].map((each) => each.innerText).join()"):
            break
    else:
        raise AssertionError("no node says why the second request stopped in it")
    assert not page.errors


async def test_evictions_are_seen_as_they_happen(page: Page, start_server: Callable[..., Any]) -> None:
    server = start_server(engine={"kv_cache_tokens": 2048})
    await asyncio.to_thread(complete, server, "the first of the prompts is this one " * 8)
    await show(page, server)
    await page.until("[...document.querySelectorAll('.cell')].some((each) => each.title.includes('first of'))")
    # An evicted node fades out, and may be gone when this test looks: the page itself remembers what it showed.
    await page.js("window.shown = []")
    await page.js(
        "setInterval(() => document.querySelectorAll('.evicted, [role=log]')"
        ".forEach((each) => window.shown.push([each.className, each.innerText])), 50)"
    )
    for i in range(24):
        await asyncio.to_thread(complete, server, f"{i} is what another prompt begins with, at some length " * 8)
    await page.until("window.shown.some(([name, text]) => name.includes('evicted') && text.includes('first of'))")
    assert await page.js("window.shown.some(([name, text]) => text.includes('evicted:'))")
    await page.until("!document.querySelector('.evicted')")
    assert not page.errors


async def test_a_request_is_seen_along_its_path(page: Page, start_server: Callable[..., Any]) -> None:
    server = start_server(null_step_seconds=0.1, engine={"max_num_batched_tokens": 64})
    await show(page, server)
    prompt = "a prompt that takes many chunks of the step's budget to be computed " * 40
    asking = asyncio.create_task(asyncio.to_thread(complete, server, prompt, max_tokens=20, ignore_eos=True))
    bar = "document.querySelector('.cell.running .done')"
    width = f"{bar} && parseFloat({bar}.style.width)"
    early = await page.until(f"({width}) < 80 && ({width})")
    assert await page.js("document.querySelector('.requests progress').value") > 0
    await page.until(f"({width}) > {early}")
    await asking
    await page.until("document.body.innerText.includes('no requests at the moment')")
    assert not page.errors


async def test_a_tool_call_is_a_card_and_json_is_indented(page: Page, shipped: Any) -> None:
    await show(page, shipped, "chat")
    await page.js("document.querySelector('.settings').open = true")
    await page.js(
        "[...document.querySelectorAll('.settings button')].find((b) => b.innerText == 'example tool').click()"
    )
    temperature = "document.querySelectorAll('.settings input')[1]"
    await page.js(f"{temperature}.value = 0; {temperature}.dispatchEvent(new Event('input', {{bubbles: true}}))")
    await send(page, "Please get the weather. The city is Zemol.")
    card = await page.until("document.querySelector('.call') && document.querySelector('.call').innerText")
    assert "get_weather" in card and '"city": "Zemol"' in card and "\n" in card
    await page.type(".call input", '{"status": "sunny", "temperature": 17}')
    await page.until("document.querySelectorAll('.message.assistant').length == 2")
    await page.until("!document.body.innerText.includes('▍')")
    assert "sunny" in await page.js("[...document.querySelectorAll('.message.assistant')].pop().innerText")
    assert "temperature" in await page.js("document.querySelector('.message.tool .json').innerText")
    assert not page.errors


@pytest.mark.parametrize("nodes", [1000, 100_000])
async def test_large_trees(
    page: Page, start_server: Callable[..., Any], null_settings: Any, tokenizer_folder: Path, nodes: int
) -> None:
    """Of the largest tree a part is shown; the page stays usable and the server fast."""
    config = null_settings(tokenizer_folder, engine={"kv_cache_tokens": 4 * nodes + 65_536, "page_size": 4})
    engine = msgspec.structs.replace(config.engine, check_when_idle=False, max_num_seqs=1024)  # a check is O(nodes)
    server = start_server(msgspec.structs.replace(config, engine=engine))
    for first in range(0, nodes, 1024):
        await asyncio.to_thread(fill, server.url, first, min(nodes, first + 1024))
    await show(page, server)
    await page.until("!!document.querySelector('button.strip')")
    assert f"{nodes:,} nodes" in (text := await page.text()), text[:300]
    await page.js("document.querySelector('button.strip').click()")
    await page.until("document.querySelectorAll('.listed button').length == 100")
    await page.js("document.querySelectorAll('.listed button')[50].click()")
    await page.until("!!document.querySelector('aside .full')")
    assert not page.errors


async def test_a_conversation_branches(page: Page, shipped: Any) -> None:
    await show(page, shipped, "chat")
    await send(page, "Who is Mira?")
    assert "baker" in await page.text() and "prompt tokens cached" in await page.text()
    await send(page, "Where does she live?", answers=2)
    # Back to the first answer, and on from there in two ways side by side.
    await page.js(
        "[...document.querySelectorAll('.message.assistant button')].find((b) => b.innerText == 'branch here').click()"
    )
    await page.js("document.querySelector('.settings').open = true")
    box = "document.querySelector('.settings input')"
    await page.js(f"{box}.value = 2; {box}.dispatchEvent(new Event('input', {{bubbles: true}}))")
    await page.until("document.querySelectorAll('.side .card').length == 1")  # the branch that was left
    await send(page, "Who is Tobin?", answers=3)
    await page.until("document.querySelectorAll('.side .card').length == 2")
    await page.js("document.querySelector('.side .card button').click()")
    await page.until("document.querySelectorAll('.message').length == 4")
    await page.js(
        "[...document.querySelectorAll('.settings button')].find((b) => b.innerText == 'as a program').click()"
    )
    program = await page.until("document.querySelector('.export') && document.querySelector('.export').innerText")
    assert ".fork(2)" in program
    compile(program, "exported", "exec")
    assert not page.errors


async def test_text_is_text(page: Page, start_server: Callable[..., Any]) -> None:
    server = start_server()
    evil = "<img src=x onerror='window.pwned=1'><script>window.pwned=1</script> " * 3
    await asyncio.to_thread(complete, server, evil)
    await show(page, server)
    await page.until("[...document.querySelectorAll('.cell')].some((each) => each.title.includes('onerror'))")
    assert await page.js("window.pwned") is None
    assert await page.js("document.querySelectorAll('img').length") == 0
    assert {url.split("/ui")[0] for url in page.requests} == {server.url}


async def test_a_key_is_asked_for_and_shows_its_own_part(page: Page, start_server: Callable[..., Any]) -> None:
    server = start_server(api_key="first-key", extra_api_keys=("other-key",))
    body = {"prompt": "what the first tenant wrote " * 6, "max_tokens": 4}
    headers = {"x-api-key": "first-key"}
    await asyncio.to_thread(httpx.post, f"{server.url}/v1/completions", json=body, headers=headers)
    await page.open(f"{server.url}/ui")
    await page.until("!!document.querySelector('input[name=key]')")
    await page.type("input[name=key]", "other-key")
    await page.until("!!document.querySelector('.state.live')")
    assert "tenant" not in await page.text()
    await page.js("sessionStorage.setItem('branchwise-key', 'first-key'); location.reload()")
    await page.until("[...document.querySelectorAll('.cell')].some((each) => each.title.includes('tenant'))")


async def test_a_refused_key_is_said(page: Page, start_server: Callable[..., Any]) -> None:
    server = start_server(api_key="first-key")
    await page.open(f"{server.url}/ui")
    await page.until("!!document.querySelector('input[name=key]')")
    assert "refused" not in await page.text()
    await page.type("input[name=key]", "wrong-key")
    await page.until("!!document.querySelector('form [role=alert]')")
    assert "The server refused that key." in await page.text()
    await page.type("input[name=key]", "first-key")
    await page.until("!!document.querySelector('.state.live')")


async def test_the_tree_by_keyboard_and_the_page_without_a_server(page: Page, start_server: Callable[..., Any]) -> None:
    server = start_server()
    await show(page, server)
    assert "Nothing is cached yet" in await page.text()
    await asyncio.to_thread(complete, server, "something that is long enough for several pages of tokens " * 4)
    await page.until("[...document.querySelectorAll('.cell')].some((each) => each.innerText.includes('something'))")
    await page.js("document.querySelector('nav + a').focus()")
    await page.press("Tab")  # one stop for the whole tree
    assert await page.js("document.activeElement.innerText") == "everything cached"
    for _ in range(2):
        await page.press("ArrowDown")
    assert "something" in await page.js("document.activeElement.innerText")
    await page.press("Enter")
    await page.until("!!document.querySelector('aside .full')")
    await page.press("ArrowUp")
    await page.press("Escape")
    await page.until("!document.querySelector('aside')")
    server.process.kill()
    await page.until("document.body.innerText.includes('the server cannot be reached; trying again')")
    assert "something" in await page.text()  # what was seen last


async def test_a_narrow_window_does_not_scroll_sideways(page: Page, start_server: Callable[..., Any]) -> None:
    server = start_server()
    await page.send("Emulation.setDeviceMetricsOverride", width=400, height=800, deviceScaleFactor=1, mobile=False)
    for view in ("tree", "figures", "chat"):
        await page.open(f"{server.url}/ui?{view}#{view}")
        await page.until("!!document.querySelector('.state.live')")
        await asyncio.to_thread(complete, server, f"{view}: a prompt of some length " * 4)
        if view == "figures":
            await page.until("document.querySelectorAll('.chart canvas').length == 4")
            chart = "[...document.querySelectorAll('.chart')].every((each) => each.scrollWidth <= each.clientWidth)"
            assert await page.js(chart)
        assert await page.js("document.documentElement.scrollWidth <= innerWidth"), view


async def test_the_reference_of_routes(page: Page, start_server: Callable[..., Any]) -> None:
    server = start_server(api_key="first-key")
    await page.open(f"{server.url}/docs")
    await page.until("!!document.querySelector('input[name=key]')")
    await page.type("input[name=key]", "first-key")
    await page.until("document.querySelectorAll('.operation').length > 30")
    assert await page.js("document.querySelectorAll('.pages a').length") > 15
    await page.js("[...document.querySelectorAll('.operation')].forEach((each) => each.open = true)")
    text = await page.text()
    assert "POST /v1/chat/completions" in text and "max_tokens" in text and "/branches/{id}" in text
    assert {url.split("/ui")[0].split("/docs")[0].split("/openapi")[0] for url in page.requests} == {server.url}
    assert not [error for error in page.errors if "401" not in error]


async def _screenshots(url: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as profile:
        async with browser(Path(profile)) as page:
            await page.open(f"{url}/ui#chat")
            await page.until("!!document.querySelector('.state.live')")
            await send(page, "Who is Mira?")
            box = "document.querySelector('.settings input')"
            await page.js(f"{box}.value = 3; {box}.dispatchEvent(new Event('input', {{bubbles: true}}))")
            await send(page, "Tell me a story.", 4)
            await page.screenshot(folder / "ui-chat.png")
            for view, index in (("tree", 0), ("figures", 1)):
                await page.js(f"document.querySelectorAll('nav button')[{index}].click()")
                if view == "tree":  # with the details of a node in which requests stopped
                    await page.js("[...document.querySelectorAll('button.cell')].slice(2, 4).pop().click()")
                await asyncio.sleep(3)
                await page.screenshot(folder / f"ui-{view}.png")


if __name__ == "__main__":
    asyncio.run(_screenshots(sys.argv[1], Path(sys.argv[2])))
