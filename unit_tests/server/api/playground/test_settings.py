"""The page's frame: what settings do to a request, keys, themes, narrow screens, labels and contrast."""

import json
import shlex
from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from unit_tests.server.api.conftest import Serving
from unit_tests.server.api.playground.conftest import Visit, serve, shown_origins

NUMBERS = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.05,
    "presence": 1.5,
    "frequency": 0.1,
    "repetition": 1.1,
    "seed": 42,
    "max_tokens": 30,
    "max_draft": 2,
}
# Text and what it stands on.
PAIRS = ["ink ground", "ink sheet", "ink draft", "soft ground", "soft sheet", "on-accent accent", "bad ground"]
CONTRAST = """pairs => pairs.map(pair => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const [text, ground] = pair.split(" ").map(name => {
    const element = document.body.appendChild(document.createElement("i"));
    element.style.color = `var(--${name})`;
    canvas.fillStyle = getComputedStyle(element).color;
    element.remove();
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(value => value / 255)
      .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  });
  return (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
})"""


def test_settings_go_into_the_request_and_empty_ones_do_not(visit: Visit) -> None:
    plain = visit.send("the fox").post_data_json
    assert plain == {
        "messages": [{"role": "user", "content": "the fox"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_spec": True,
        "logprobs": True,
        "top_logprobs": 5,
    }
    visit.wait_finished()
    for label, value in NUMBERS.items():
        visit.page.get_by_label(label, exact=True).fill(str(value))
    visit.page.get_by_label("stop, one per line").fill("###\n\\n\\n")
    visit.page.get_by_label("System prompt").fill("Be brief.")
    visit.page.get_by_label("Off", exact=True).check()
    visit.page.get_by_label("five alternatives").uncheck()
    full = visit.send("the dog").post_data_json
    visit.wait_finished()
    assert full["messages"][0] == {"role": "system", "content": "Be brief."}
    assert full["stop"] == ["###", "\n\n"] and full["top_logprobs"] == 0
    assert full["chat_template_kwargs"] == {"enable_thinking": False}
    assert full["speculative"] == {"max_draft": NUMBERS["max_draft"]}
    names = {"presence": "presence_penalty", "frequency": "frequency_penalty", "repetition": "repetition_penalty"}
    numbers = {names.get(label, label): value for label, value in NUMBERS.items() if label != "max_draft"}
    assert {name: full[name] for name in numbers} == numbers


def test_the_request_is_copied_as_a_curl_command_without_the_key(visit: Visit) -> None:
    visit.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visit.page.get_by_label("API key").fill("secret")
    request = visit.send("it's the fox")
    visit.wait_finished()
    visit.page.get_by_role("tab", name="Raw").click()
    visit.page.get_by_role("button", name="Copy as curl").click()
    expect(visit.page.get_by_role("button", name="Copied")).to_be_visible()
    words = [word for word in shlex.split(visit.page.evaluate("navigator.clipboard.readText()")) if word != "\n"]
    assert words[:2] == ["curl", "-N"] and request.url in words
    assert "Authorization: Bearer $API_KEY" in words and "secret" not in " ".join(words)
    assert json.loads(words[words.index("-d") + 1]) == request.post_data_json
    expect(visit.page.locator("#raw-request")).to_contain_text('"content": "it\'s the fox"')
    expect(visit.page.locator("#raw-response")).to_contain_text("data: [DONE]")


def test_the_key_is_sent_and_kept_for_this_tab_alone(visit: Visit) -> None:
    visit.page.get_by_label("API key").fill("secret")
    visit.page.get_by_label("API key").blur()
    assert visit.send("the fox").headers["authorization"] == "Bearer secret"
    visit.wait_finished()
    visit.page.reload()
    expect(visit.page.get_by_label("API key")).to_have_value("secret")
    assert visit.page.evaluate("Object.values(localStorage)") == []
    other = visit.page.context.new_page()
    other.goto(visit.url)
    expect(other.get_by_label("API key")).to_have_value("")


def test_a_refused_key_is_told(visit: Visit) -> None:
    refusal = {"error": {"message": "the request has no valid key", "type": "x", "param": None, "code": 401}}
    visit.page.route("**/v1/models", lambda route: route.fulfill(status=401, json=refusal))
    visit.page.get_by_role("button", name="Settings").click()
    visit.page.reload()
    expect(visit.page.locator("#model")).to_have_text("the request has no valid key")
    expect(visit.page.get_by_label("API key")).to_be_visible()
    visit.forgive("status of 401")


def test_tools_that_are_not_json_are_told_and_nothing_is_sent(visit: Visit) -> None:
    visit.page.get_by_label("definitions, a JSON list").fill("[{")
    visit.prompt.fill("the fox")
    visit.prompt.press("Enter")
    expect(visit.page.locator("#tools-problem")).to_contain_text("It is not JSON")
    expect(visit.page.locator(".turn")).to_have_count(0)
    expect(visit.prompt).to_have_value("the fox")


def test_the_keyboard_is_enough(visit: Visit) -> None:
    visit.page.get_by_role("button", name="New").focus()
    visit.page.keyboard.press("/")
    expect(visit.prompt).to_be_focused()
    visit.page.keyboard.type("the fox")
    visit.page.keyboard.press("Shift+Enter")
    visit.page.keyboard.type("/ the dog")
    expect(visit.prompt).to_have_value("the fox\n/ the dog")
    expect(visit.page.locator(".turn")).to_have_count(0)
    visit.page.keyboard.press("Enter")
    expect(visit.content).to_have_text("user\nthe fox\n/ the dog")
    expect(visit.prompt).to_have_value("")
    visit.page.get_by_role("tab", name="Live").focus()
    visit.page.keyboard.press("ArrowRight")
    expect(visit.page.get_by_role("tab", name="Raw")).to_be_focused()
    expect(visit.page.get_by_role("tab", name="Raw")).to_have_attribute("aria-selected", "true")
    expect(visit.page.get_by_role("tabpanel", name="Raw")).to_be_visible()


def test_a_token_under_the_pointer_tells_its_alternatives(visit: Visit) -> None:
    visit.ask("the fox")
    tip = visit.page.get_by_role("tooltip")
    expect(tip).to_be_hidden()
    visit.answer.locator(".tok.d").last.hover()
    expect(tip).to_contain_text("60.7 %")  # the fake engine's log-probability is -0.5
    expect(tip).to_contain_text("accepted draft")
    expect(tip.locator(".alternative")).to_have_count(5)
    visit.prompt.hover()
    expect(tip).to_be_hidden()


def test_marks_can_be_switched_off(visit: Visit) -> None:
    visit.ask("the fox")
    ground = "span => getComputedStyle(span).backgroundColor"
    token = visit.answer.locator(".tok.d:not(.hidden, .blank)").last
    visit.page.get_by_label("Highlight").uncheck()
    assert token.evaluate(ground) == "rgba(0, 0, 0, 0)"
    visit.page.get_by_label("Highlight").check()
    assert token.evaluate(ground) != "rgba(0, 0, 0, 0)"
    assert "d" in shown_origins(visit.answer)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_as_light_as_the_system_until_told_otherwise(
    fake: Serving, make_visit: Callable[..., Visit], scheme: str
) -> None:
    with serve(fake) as url:
        visit = make_visit(url, color_scheme=scheme)
        brightness = "Number(getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0])"
        assert (visit.page.evaluate(brightness) > 128) == (scheme == "light")
        assert min(visit.page.evaluate(CONTRAST, PAIRS)) >= 4.5
        visit.page.get_by_role("button", name="Dark or light").click()
        assert (visit.page.evaluate(brightness) > 128) == (scheme == "dark")
        visit.page.reload()
        assert (visit.page.evaluate(brightness) > 128) == (scheme == "dark")


def test_every_control_has_a_name_and_the_focus_is_seen(visit: Visit) -> None:
    nameless = visit.page.locator("button, input, select, textarea").evaluate_all(
        "all => all.filter(one => !(one.ariaLabel || one.labels?.length || one.textContent.trim()))"
        ".map(one => one.outerHTML)"
    )
    assert nameless == []
    visit.page.keyboard.press("Tab")
    assert visit.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_a_phone_shows_one_thing_at_a_time(fake: Serving, make_visit: Callable[..., Visit]) -> None:
    with serve(fake) as url:
        visit = make_visit(url, viewport={"width": 360, "height": 740})
        settings, inspector = visit.page.locator("#settings"), visit.page.locator("#inspector")
        expect(settings).to_be_hidden()
        expect(inspector).to_be_hidden()
        visit.ask("the quick brown fox jumps over the lazy dog and " + "x" * 60)
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 360
        for name in ("#toggle-settings", "#toggle-inspector", "#clear", "#theme", "#prompt", "#send", "#highlight"):
            box = visit.page.locator(name).bounding_box()
            assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 360, name
            assert box["y"] >= 0 and box["y"] + box["height"] <= 740, name
        visit.page.get_by_role("button", name="Settings").click()
        expect(settings).to_be_visible()
        visit.page.get_by_role("button", name="Inspect").click()
        expect(inspector).to_be_visible()
        expect(settings).to_be_hidden()
        visit.page.keyboard.press("Escape")
        expect(inspector).to_be_hidden()
