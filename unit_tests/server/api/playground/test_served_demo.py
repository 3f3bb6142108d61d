"""The page and the whole server on the demo checkpoint with three drafts, and the picture of it in the README.

python -m unit_tests.server.api.playground.test_served_demo docs/playground.png
"""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import expect

from server.config import EngineConfig
from unit_tests.server.api.playground.conftest import (
    Visit,
    choices_of,
    chromium,
    events_of,
    is_generation,
    origins_of,
    shown_origins,
)
from unit_tests.server.test_end_to_end import RunningServer, free_ports

QUESTIONS = (
    "Tom has 3 boxes with 4 apples each. How many apples does he have?",
    "Ann has 12 pens and buys 7 more. She gives 5 to Tom. How many pens does she have?",
)
SIZE = {"width": 1280, "height": 800}
MAX_PICTURE_BYTES = 300_000


@contextmanager
def serve_demo(directory: Path) -> Iterator[str]:
    """`python -m server` on a copy of the demo in `directory`, where its log goes; gives the URL."""
    shutil.copytree(EngineConfig().model, directory / "demo")
    (port,) = free_ports(1)
    server = RunningServer(directory / "demo", port, "--mtp-step", "3", "--speculation", "fixed")
    try:
        yield f"{server.wait_ready().url}/"
    finally:
        assert server.stop() == 0


def take_picture(visit: Visit, path: Path) -> None:
    """The page after a call of a tool and an answer with thoughts, with the pointer on a token."""
    visit.page.get_by_label("temperature").fill("0")
    visit.page.get_by_role("button", name="Example").click()
    visit.ask("What is the weather in Paris?")
    for call in visit.page.locator(".call textarea").all():
        call.fill("sunny, 21 degrees")
        call.press("Enter")
        expect(visit.page.locator(".answer")).to_have_count(2)
        visit.wait_finished()
    visit.page.get_by_label("definitions, a JSON list").fill("")
    visit.page.get_by_label("On", exact=True).check()
    visit.ask(QUESTIONS[0])
    visit.answer.locator("summary").click()
    visit.answer.locator(".tok.d:not(.hidden, .blank):visible").last.hover()
    expect(visit.page.get_by_role("tooltip")).to_be_visible()
    visit.page.screenshot(path=path)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the demo."""
    with serve_demo(tmp_path_factory.mktemp("served")) as served:
        yield served


def test_accepted_drafts_are_marked_as_many_as_the_server_counted(url: str, make_visit: Callable[..., Visit]) -> None:
    visit = make_visit(url)
    visit.page.get_by_label("temperature").fill("0")
    response = visit.ask(QUESTIONS[0])
    shown, usage = shown_origins(visit.answer), events_of(response)[-1]["usage"]
    assert shown == origins_of(response) and shown[0] == "p"
    assert len(shown) == usage["completion_tokens"]
    assert shown.count("d") == usage["completion_tokens_details"]["accepted_prediction_tokens"] > 0
    content = "".join(choice["delta"].get("content") or "" for choice in choices_of(response))
    assert content and visit.content.text_content() == content
    expect(visit.page.locator("#positions tr")).to_have_count(3)
    visit.page.get_by_label("max_draft").fill("0")
    with visit.page.expect_request(is_generation) as request:
        visit.page.get_by_role("button", name="Regenerate").click()
    plain = request.value.response()
    visit.wait_finished()
    assert plain is not None and "d" not in shown_origins(visit.answer)
    assert visit.content.text_content() == content


def test_what_the_cache_gave_is_shown(url: str, make_visit: Callable[..., Visit]) -> None:
    visit = make_visit(url)
    # Prefixes of a few tokens are not worth a checkpoint.
    visit.page.get_by_label("System prompt").fill("Solve the problem and write the result at the end. " * 8)
    for question in QUESTIONS:
        response = visit.ask(question)
    usage = events_of(response)[-1]["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0
    expect(visit.page.locator("#cached")).to_have_text(f"{cached} of {usage['prompt_tokens']}")


def test_the_picture_is_small(url: str, make_visit: Callable[..., Visit], tmp_path: Path) -> None:
    take_picture(make_visit(url, viewport=SIZE), tmp_path / "page.png")
    assert 20_000 < (tmp_path / "page.png").stat().st_size < MAX_PICTURE_BYTES


def main() -> None:
    """Write the picture to the path that the command line names."""
    with tempfile.TemporaryDirectory() as folder, serve_demo(Path(folder)) as url, chromium() as browser:
        take_picture(Visit(browser.new_page(viewport=SIZE, reduced_motion="reduce"), url), Path(sys.argv[1]))


if __name__ == "__main__":
    main()
