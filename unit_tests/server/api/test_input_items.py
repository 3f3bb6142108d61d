"""The items that a response was made of: through the official client, and page by page."""

from typing import Any

import msgspec
import openai
import pytest

from server.api.input_items import MAX_ITEMS, Page, list_items, read_page
from server.errors import InvalidRequest
from unit_tests.server.api.conftest import CALL, ScriptedServing, Serving
from unit_tests.server.api.test_requests import check_error
from unit_tests.server.api.test_responses import PATH, WEATHER, ask, make_client

ITEMS = [msgspec.json.encode({"role": "user", "content": f"text {i}"}) for i in range(5)]


def texts(page: dict[str, Any]) -> list[str]:
    """The texts of the items."""
    return [bytes(item["content"][0]["text"]).decode().strip('"') for item in page["data"]]


def test_a_conversation_is_listed_through_the_official_client(scripted: ScriptedServing) -> None:
    client = make_client(scripted)
    scripted.say(CALL)
    first = client.responses.create(model="tiny", input="How warm is it?", tools=[WEATHER], instructions="Be brief.")
    (item,) = client.responses.input_items.list(first.id)
    assert (item.type, item.role, item.status) == ("message", "user", "completed")  # type: ignore[union-attr]
    assert item.content[0].to_dict() == {"type": "input_text", "text": "How warm is it?"}  # type: ignore[union-attr]
    scripted.say("Zero.")
    result: Any = {"type": "function_call_output", "call_id": first.output[0].call_id, "output": "0"}  # type: ignore
    chained = client.responses.create(model="tiny", input=[result], previous_response_id=first.id, tools=[WEATHER])
    found = list(client.responses.input_items.list(chained.id, order="asc", limit=1))
    assert [one.type for one in found] == ["message", "function_call", "function_call_output"]
    assert found[1].id == first.output[0].id and found[2].output == "0"  # type: ignore[union-attr]
    assert [one.id for one in client.responses.input_items.list(chained.id)] == [one.id for one in found][::-1]
    assert len({one.id for one in found}) == 3


def test_a_deleted_response_has_none(scripted: ScriptedServing) -> None:
    client = make_client(scripted)
    response = client.responses.create(model="tiny", input="hi")
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError, match=response.id):
        client.responses.input_items.list(response.id)
    with pytest.raises(openai.NotFoundError, match=response.id):
        client.responses.delete(response.id)


def test_an_item_keeps_what_it_came_with() -> None:
    items: list[dict[str, Any]] = [
        {"id": "mine", "type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}], "x": [1]},
        {"role": "assistant", "content": "b", "id": None, "status": "incomplete"},
        {"type": "reasoning", "summary": [], "id": 5},
    ]
    page = list_items("resp_7", [msgspec.json.encode(item) for item in items], Page(is_backwards=False))
    found = msgspec.json.decode(msgspec.json.encode(page["data"]))
    assert found[0] == {**items[0], "status": "completed"}
    part = {"type": "output_text", "text": "b", "annotations": []}
    rest = {"role": "assistant", "status": "incomplete", "type": "message"}
    assert found[1] == {**rest, "id": "msg_7_1", "content": [part]}
    assert found[2]["id"] == "rs_7_2"


def test_pages_follow_each_other_in_both_directions() -> None:
    forward = list_items("resp_1", ITEMS, Page(2, is_backwards=False))
    assert texts(forward) == ["text 0", "text 1"]
    assert (forward["first_id"], forward["last_id"], forward["has_more"]) == ("msg_1_0", "msg_1_1", True)
    last = list_items("resp_1", ITEMS, Page(2, False, "msg_1_3"))
    assert (texts(last), last["has_more"]) == (["text 4"], False)
    backward = list_items("resp_1", ITEMS, Page(3, True, "msg_1_4"))
    assert (texts(backward), backward["has_more"]) == (["text 3", "text 2", "text 1"], True)
    none = list_items("resp_1", ITEMS, Page(after="msg_1_0"))
    assert (none["data"], none["first_id"], none["last_id"], none["has_more"]) == ([], None, None, False)
    with pytest.raises(InvalidRequest, match="after is 'msg_9', it must be the id of an item of resp_1"):
        list_items("resp_1", ITEMS, Page(after="msg_9"))


def test_a_url_without_a_query_is_the_last_page() -> None:
    assert read_page({}) == read_page({"limit": "", "order": "", "after": ""}) == Page(20, True, "")
    assert read_page({"limit": "100", "order": "asc", "after": "12", "include": "x"}) == Page(100, False, "12")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("limit", "0", f"limit is 0, it must be in 1..{MAX_ITEMS}"),
        ("limit", "101", f"limit is 101, it must be in 1..{MAX_ITEMS}"),
        ("limit", "-1", f"limit is -1, it must be in 1..{MAX_ITEMS}"),
        ("limit", "2.5", "limit is '2.5', it must be an integer"),
        ("limit", "9" * 5000, "(5000 characters), it must be an integer"),
        ("order", "up", "order is 'up', it must be one of asc, desc"),
        ("after", "msg_9", "after is 'msg_9', it must be the id of an item"),
    ],
)
def test_a_wrong_query_is_named_with_its_limit(serving: Serving, name: str, value: str, message: str) -> None:
    url = f"{PATH}/{ask(serving)['id']}/input_items"
    check_error(serving.http.get(url, params={name: value}), 400, name, message)


def test_a_response_that_is_not_there_has_none(serving: Serving) -> None:
    check_error(serving.http.get(f"{PATH}/resp_1/input_items"), 404, None, "resp_1")
