"""What a response was made of, as its items, page by page.

Items stay as the client sent them, but for what it may leave out. Knows nothing of HTTP.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from server.api.fields import Fields, known_fields, shown
from server.api.response_items import FUNCTION_CALL, FUNCTION_OUTPUT, MESSAGE, THOUGHT
from server.errors import InvalidRequest

MAX_ITEMS = 100
ORDERS = ("asc", "desc")
_DEFAULT_ITEMS = 20
_QUERY = known_fields("limit", "order", "after")
_NUMBER = re.compile(r"-?[0-9]{1,18}")
_PREFIXES = {MESSAGE: "msg_", THOUGHT: "rs_", FUNCTION_CALL: "fc_", FUNCTION_OUTPUT: "fco_"}

Item = dict[str, Any]


@dataclass(frozen=True)
class Page:
    """At most `limit` items from the first on or, if it `is_backwards`, from the last; those after the one of the id
    `after`, if it has one."""

    limit: int = _DEFAULT_ITEMS
    is_backwards: bool = True
    after: str = ""


def read_page(query: Mapping[str, str]) -> Page:
    """The page that a URL asks for. Raises InvalidRequest."""
    limit: int | str = query.get("limit", "")
    if _NUMBER.fullmatch(str(limit)):
        limit = int(limit)
    values = {name: value for name, value in {**query, "limit": limit}.items() if value != ""}
    fields = Fields(_QUERY, msgspec.json.encode(values))
    order = fields.text("order", "desc")
    if order not in ORDERS:
        raise InvalidRequest(f"order is {shown(order)}, it must be one of {', '.join(ORDERS)}", "order")
    return Page(fields.integer("limit", _DEFAULT_ITEMS, 1, MAX_ITEMS) or 1, order == "desc", fields.text("after", ""))


def list_items(response_id: str, items: Sequence[bytes], page: Page) -> dict[str, Any]:
    """A page of the items of a response. Raises InvalidRequest for a page after what is none of them."""
    name = response_id.removeprefix("resp_")
    described = [_describe(item, f"{name}_{index}") for index, item in enumerate(items)]
    ids = [item["id"] for item in described]
    if page.is_backwards:
        described, ids = described[::-1], ids[::-1]
    if page.after and page.after not in ids:
        raise InvalidRequest(f"after is {shown(page.after)}, it must be the id of an item of {response_id}", "after")
    start = ids.index(page.after) + 1 if page.after else 0
    end = start + page.limit
    data = described[start:end]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": end < len(described),
    }


def _describe(raw: bytes, name: str) -> Item:
    """An item with all that clients look for; `name` makes an id where it has none."""
    sent = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    item: Item = {key: value for key, value in sent.items() if bytes(value) != b"null"}
    kind = _text(item, "type") or MESSAGE
    item |= {"id": _text(item, "id") or _PREFIXES[kind] + name, "type": kind}
    item.setdefault("status", "completed")
    text = item.get("content")
    if kind == MESSAGE and text is not None and bytes(text)[:1] == b'"':
        is_output = _text(item, "role") == "assistant"
        part = {"type": "output_text", "text": text, "annotations": []}
        item["content"] = [part if is_output else {"type": "input_text", "text": text}]
    return item


def _text(item: Item, key: str) -> str:
    """A field that should be a text; empty if it is not."""
    value = msgspec.json.decode(bytes(item[key])) if key in item else ""
    return value if isinstance(value, str) else ""
