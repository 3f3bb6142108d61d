"""The page in a real browser, Debian's chromium, served by the application with a fake engine.

The engine answers with the prompt's own tokens, so what a test writes into the page comes back as the model's answer,
after the word `user`.
"""

import asyncio
import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, Locator, Page, Request, Response, Route, expect, sync_playwright

from unit_tests.server.api.conftest import Serving

CHROMIUM = shutil.which("chromium")
FOLDER = Path(__file__).parent
# The machine may be busy, and nothing waits longer than it must.
PATIENCE_MILLISECONDS = 30_000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests here are slow; without a browser they are skipped."""
    for item in items:
        if item.path.is_relative_to(FOLDER):
            item.add_marker(pytest.mark.slow)
            if CHROMIUM is None:
                item.add_marker(pytest.mark.skip(reason="needs chromium on the PATH (apt-get install chromium)"))


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser."""
    expect.set_options(timeout=PATIENCE_MILLISECONDS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser per module: while it runs, its thread can run no event loop of another test."""
    with chromium() as started:
        yield started


class Visit:
    """A visitor's view. `complaints` are the console's errors, `foreign` the requests that left the server."""

    def __init__(self, page: Page, url: str):
        self.page, self.url = page, url
        self.complaints: list[str] = []
        self.foreign: list[str] = []
        page.set_default_timeout(PATIENCE_MILLISECONDS)
        page.on("console", lambda message: self._note(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.route("**/*", self._watch)
        page.goto(url)
        expect(page.locator("#model")).to_contain_text("tokens of context")

    @property
    def prompt(self) -> Locator:
        """The box for the next message."""
        return self.page.locator("#prompt")

    @property
    def answer(self) -> Locator:
        """The newest answer."""
        return self.page.locator(".answer").last

    @property
    def content(self) -> Locator:
        """The text of the newest answer."""
        return self.answer.locator(".content")

    def send(self, text: str) -> Request:
        """Write a message and send it; returns the request that asks for the answer."""
        self.prompt.fill(text)
        with self.page.expect_request(is_generation) as request:
            self.prompt.press("Enter")
        return request.value

    def ask(self, text: str) -> Response:
        """Like `send`, and wait until the answer is whole."""
        response = self.send(text).response()
        assert response is not None
        self.wait_finished()
        return response

    def wait_finished(self) -> None:
        """Until nothing streams."""
        expect(self.page.locator(".answer[aria-busy=true]")).to_have_count(0)

    def forgive(self, *parts: str) -> None:
        """Complaints that the test expects, each with one of `parts`."""
        assert all(any(part in complaint for part in parts) for complaint in self.complaints), self.complaints
        self.complaints.clear()

    def _note(self, complaint: str) -> None:
        # The server of a test may end before the page, which then asks it for figures in vain.
        if "ERR_CONNECTION_REFUSED" not in complaint:
            self.complaints.append(complaint)

    def _watch(self, route: Route) -> None:
        if not route.request.url.startswith(self.url):
            self.foreign.append(route.request.url)
        route.continue_()


@pytest.fixture
def make_visit(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Opens a page in a browser profile of its own; at the end nothing was loaded from elsewhere and nothing broke."""
    visits = []

    def make(url: str, **settings: Any) -> Visit:
        still = {"viewport": {"width": 1400, "height": 900}, "reduced_motion": "reduce"}
        context = browser.new_context(**{**still, **settings})
        visits.append(Visit(context.new_page(), url))
        return visits[-1]

    yield make
    for visit in visits:
        visit.page.context.close()
    assert [(visit.foreign, visit.complaints) for visit in visits] == [([], [])] * len(visits)


@contextmanager
def serve(serving: Serving) -> Iterator[str]:
    """Serve the application on a port of its own; gives its URL."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    http = uvicorn.Server(uvicorn.Config(serving.app, log_config=None, lifespan="off", timeout_graceful_shutdown=1))

    async def run() -> None:
        async with serving.delivering():
            await http.serve([listener])

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        http.should_exit = True
        thread.join()


@pytest.fixture
def fake(make_serving: Callable[..., Serving]) -> Serving:
    """The served application, with three drafts per step."""
    return make_serving(mtp_step=3)


@pytest.fixture
def visit(fake: Serving, make_visit: Callable[..., Visit]) -> Iterator[Visit]:
    """The page of `fake`, on a wide screen."""
    with serve(fake) as url:
        yield make_visit(url)


def is_generation(request: Request) -> bool:
    """Whether a request asks for an answer."""
    return request.method == "POST" and request.url.endswith("completions")


def pause_after(serving: Serving, num_steps: int) -> None:
    """Let the engine take so many steps more, then hold it until `serving.channel.paused` is false again."""
    step, end = serving.engine.step, serving.engine.stats().num_steps + num_steps

    def counted() -> Any:
        serving.channel.paused = serving.engine.stats().num_steps + 1 == end
        return step()

    serving.engine.step = counted  # type: ignore[method-assign]


def events_of(response: Response) -> list[dict[str, Any]]:
    """The payloads of an event stream."""
    lines = response.text().splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def choices_of(response: Response) -> list[dict[str, Any]]:
    """The `choices` entries of an event stream."""
    return [choice for event in events_of(response) for choice in event["choices"]]


def origins_of(response: Response) -> str:
    """Where each token of an answer came from, as the API told."""
    return "".join(choice["spec"]["origins"] for choice in choices_of(response) if choice.get("spec"))


def shown_origins(answer: Locator) -> str:
    """Where each token of an answer came from, as the page shows."""
    names = answer.locator(".tok").evaluate_all("spans => spans.map(span => span.className)")
    return "".join(name.split()[1] for name in names)
