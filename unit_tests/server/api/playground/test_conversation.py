"""Chatting on the page: streaming, marked drafts, thinking, calls, stopping, editing."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import expect

from server.messages import Abort, Failed
from unit_tests.server.api.conftest import Serving
from unit_tests.server.api.playground.conftest import (
    Visit,
    choices_of,
    events_of,
    is_generation,
    origins_of,
    pause_after,
    shown_origins,
)

TEXT = "the quick brown fox — naïve café 中文 字符 😀"
CALL = "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>"
ATTACK = '<img src=x onerror="window.hacked = 1"><script>window.hacked = 1</script>'


def wait_until(condition: Callable[[], bool], page: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        page.wait_for_timeout(20)


def test_every_token_is_shown_with_the_origin_that_the_api_told(visit: Visit) -> None:
    response = visit.ask(TEXT)
    expect(visit.content).to_have_text(f"user\n{TEXT}")
    usage = events_of(response)[-1]["usage"]
    shown = shown_origins(visit.answer)
    assert shown == origins_of(response)
    assert len(shown) == usage["completion_tokens"]
    assert shown.count("d") == usage["completion_tokens_details"]["accepted_prediction_tokens"] > 0
    written = "".join(visit.answer.locator(".content .tok").all_text_contents())
    assert written == f"user\n{TEXT}"


def test_the_figures_are_those_of_the_answer(visit: Visit) -> None:
    response = visit.ask(TEXT)
    specs = [choice["spec"] for choice in choices_of(response) if choice.get("spec")]
    steps = [spec for spec in specs if "p" not in spec["origins"] and spec["origins"]]
    usage = events_of(response)[-1]["usage"]
    figure = visit.page.locator("#figures")
    length = (usage["completion_tokens"] - 1) / len(steps)
    expect(figure.locator("#accept-length")).to_have_text(f"{length:.2f}")
    accepted, proposed = (sum(spec[name] for spec in specs) for name in ("accepted", "proposed"))
    expect(figure.locator("#accepted")).to_have_text(f"{accepted} of {proposed}")
    expect(figure.locator("#output-tokens")).to_have_text(str(usage["completion_tokens"]))
    expect(figure.locator("#cached")).to_have_text(f"0 of {usage['prompt_tokens']}")
    for name in ("#rate", "#ttft", "#total"):
        assert float((figure.locator(name).inner_text()).split()[0]) > 0
    expect(visit.page.locator("#step-plot rect.target")).to_have_count(len(steps))
    assert " " in (visit.page.locator("#rate-plot polyline").get_attribute("points") or "")
    shares = [100 * sum(spec["accepted"] > i for spec in steps) / len(steps) for i in range(3)]
    expect(visit.page.locator("#positions td:last-child")).to_have_text([f"{share:.0f} %" for share in shares])


def test_text_is_there_before_the_answer_is_whole(visit: Visit, fake: Serving) -> None:
    pause_after(fake, 3)
    visit.send("the quick brown fox")
    expect(visit.content).to_contain_text("user\nthe")
    expect(visit.answer).to_have_attribute("aria-busy", "true")
    expect(visit.page.locator("#stop")).to_be_visible()
    assert "fox" not in visit.content.inner_text()
    fake.channel.paused = False
    expect(visit.content).to_have_text("user\nthe quick brown fox")
    expect(visit.page.locator("#send")).to_be_visible()


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_stopping_keeps_what_has_come_and_aborts_the_request(visit: Visit, fake: Serving, how: str) -> None:
    pause_after(fake, 3)
    visit.send("the quick brown fox")
    expect(visit.content).to_contain_text("user")
    if how == "Escape":
        visit.prompt.press("Escape")
    else:
        visit.page.get_by_role("button", name="Stop").click()
    expect(visit.answer.locator(".figures")).to_contain_text("stopped")
    assert visit.content.inner_text().startswith("user") and "fox" not in visit.content.inner_text()
    # Before the engine goes on: a fast one would be done by the time that a busy machine tells of the abort.
    wait_until(lambda: isinstance(fake.channel.sent[-1], Abort), visit.page)
    fake.channel.paused = False
    visit.ask("jumps")
    expect(visit.content).to_contain_text("user\nthe quick")


def test_thinking_unfolds_while_it_streams_and_folds_when_it_is_over(visit: Visit, fake: Serving) -> None:
    visit.page.get_by_label("On", exact=True).check()
    pause_after(fake, 3)
    request = visit.send("the quick brown fox</think>\n\njumps over")
    assert request.post_data_json["chat_template_kwargs"] == {"enable_thinking": True}
    thinking = visit.answer.locator("details")
    expect(thinking).to_have_attribute("open", "")
    expect(thinking.locator(".reasoning")).to_contain_text("user")
    fake.channel.paused = False
    expect(thinking).not_to_have_attribute("open", "")
    visit.wait_finished()
    expect(visit.content).to_have_text("jumps over")
    thinking.locator("summary").click()
    expect(thinking.locator(".reasoning")).to_have_text("user\nthe quick brown fox")
    response = request.response()
    assert response is not None and shown_origins(visit.answer) == origins_of(response)


def test_a_call_is_a_card_whose_answer_goes_back_to_the_model(visit: Visit, fake: Serving) -> None:
    visit.page.get_by_role("button", name="Example").click()
    pause_after(fake, 12)
    first = visit.send(CALL)
    (tool,) = first.post_data_json["tools"]
    assert tool["function"]["name"] == "get_weather" and first.post_data_json["tool_choice"] == "auto"
    card = visit.answer.locator(".call")
    expect(card.locator("h3")).to_have_text("get_weather")
    expect(card.get_by_label("Result")).to_be_disabled()
    fake.channel.paused = False
    visit.wait_finished()
    assert json.loads(card.locator(".arguments").inner_text()) == {"city": "Rome"}
    response = first.response()
    assert response is not None and shown_origins(visit.answer) == origins_of(response)
    card.get_by_label("Result").fill("sunny")
    with visit.page.expect_request(is_generation) as second:
        card.get_by_label("Result").press("Enter")
    _, asked, answered = second.value.post_data_json["messages"]
    assert asked["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    assert answered == {"role": "tool", "tool_call_id": asked["tool_calls"][0]["id"], "content": "sunny"}
    expect(visit.page.locator(".answer")).to_have_count(2)
    visit.wait_finished()


def test_an_edited_message_is_answered_anew_and_what_followed_it_goes(visit: Visit) -> None:
    visit.ask("the fox")
    visit.ask("the dog")
    visit.page.locator(".user .edit").first.click()
    visit.page.get_by_label("Edit the message").fill("the cat")
    with visit.page.expect_request(is_generation) as request:
        visit.page.get_by_label("Edit the message").press("Enter")
    assert request.value.post_data_json["messages"] == [{"role": "user", "content": "the cat"}]
    visit.wait_finished()
    expect(visit.page.locator(".turn")).to_have_count(2)
    expect(visit.content).to_have_text("user\nthe cat")


def test_the_last_message_is_edited_with_the_arrow_and_left_with_escape(visit: Visit) -> None:
    visit.ask("the fox")
    visit.prompt.press("ArrowUp")
    box = visit.page.get_by_label("Edit the message")
    expect(box).to_be_focused()
    expect(box).to_have_value("the fox")
    box.fill("other")
    box.press("Escape")
    expect(visit.page.locator(".user .text")).to_have_text("the fox")
    expect(visit.prompt).to_be_focused()


def test_an_answer_is_generated_anew_with_the_settings_of_now(visit: Visit) -> None:
    visit.ask("the fox")
    visit.page.get_by_label("seed").fill("7")
    with visit.page.expect_request(is_generation) as request:
        visit.page.get_by_role("button", name="Regenerate").click()
    assert request.value.post_data_json["messages"] == [{"role": "user", "content": "the fox"}]
    assert request.value.post_data_json["seed"] == 7
    visit.wait_finished()
    expect(visit.page.locator(".answer")).to_have_count(1)


def test_a_conversation_goes_on_and_is_cleared(visit: Visit) -> None:
    visit.ask("the fox")
    roles = [message["role"] for message in visit.send("the dog").post_data_json["messages"]]
    assert roles == ["user", "assistant", "user"]
    visit.wait_finished()
    visit.page.get_by_role("button", name="New").click()
    expect(visit.page.locator(".turn")).to_have_count(0)
    expect(visit.page.get_by_role("heading", name="bicycle")).to_be_visible()


def test_whatever_comes_from_outside_is_shown_as_text(visit: Visit) -> None:
    token = {"token": ATTACK, "bytes": list(ATTACK.encode()), "logprob": -0.1}
    told = {
        "logprobs": {"content": [{**token, "top_logprobs": [token]}]},
        "spec": {"accepted": 1, "proposed": 1, "origins": "d"},
    }
    call = {"index": 0, "id": "1", "function": {"name": ATTACK, "arguments": ATTACK}}
    choices: list[dict[str, Any]] = [
        {"delta": {"reasoning_content": ATTACK}, **told},
        {"delta": {"content": ATTACK}, **told},
        {"delta": {"content": ATTACK}},
        {"delta": {"tool_calls": [call]}},
    ]
    events: list[dict[str, Any]] = [{"choices": [{"index": 0, **choice}]} for choice in choices]
    events.append({"error": {"message": ATTACK, "code": 500}})
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    visit.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    visit.ask(ATTACK)
    for place in (".user .text", ".reasoning", ".call h3", ".call .arguments", ".problem"):
        expect(visit.page.locator(f"#log {place}")).to_have_text(ATTACK)
    expect(visit.content).to_have_text(ATTACK * 2)
    visit.answer.locator(".content .tok").hover()
    expect(visit.page.get_by_role("tooltip")).to_contain_text("<img")
    assert visit.page.locator("img, script:not([src])").count() == 0
    assert visit.page.evaluate("window.hacked") is None


def test_an_error_of_the_api_is_shown_and_left_out_of_the_conversation(visit: Visit) -> None:
    visit.page.get_by_label("temperature").fill("5")
    visit.ask("the fox")
    expect(visit.answer.get_by_role("alert")).to_have_text("temperature is 5, it must be in [0, 2]")
    visit.page.get_by_label("temperature").fill("")
    assert [m["role"] for m in visit.send("the dog").post_data_json["messages"]] == ["user", "user"]
    visit.wait_finished()
    visit.forgive("status of 400")


def test_an_error_inside_a_stream_is_shown_below_what_has_come(visit: Visit, fake: Serving) -> None:
    step = fake.engine.step

    def fail_third() -> Any:
        outputs = step()
        if fake.engine.stats().num_steps == 3:
            return [Failed(output.request_id, "ModelFailure", "the logits are not finite") for output in outputs]
        return outputs

    fake.engine.step = fail_third  # type: ignore[method-assign]
    visit.ask("the quick brown fox")
    expect(visit.answer.get_by_role("alert")).to_contain_text("the logits are not finite")
    expect(visit.content).to_contain_text("user")


def test_a_completion_continues_the_text_itself(visit: Visit) -> None:
    visit.page.get_by_label("Completion", exact=True).check()
    visit.page.get_by_label("max_tokens").fill("120")
    response = visit.ask(TEXT)
    assert response.request.post_data_json["prompt"] == TEXT
    assert (visit.content.text_content() or "").startswith(TEXT)
    expect(visit.answer.locator(".figures")).to_contain_text("cut at max_tokens")
    assert shown_origins(visit.answer) == origins_of(response)
