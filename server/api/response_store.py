"""Responses that are kept for later, in bounded memory. Knows bytes and ids, not what they mean."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from server.api.fields import shown
from server.errors import NotFound

MAX_STORED_BYTES = 64 * 2**20
# What a stored response takes besides its bytes, roughly, and each item of its own.
_OVERHEAD_BYTES, _ITEM_OVERHEAD_BYTES = 1024, 512


@dataclass(frozen=True)
class Stored:
    """A finished response: its JSON, the items of the conversation that it was made of (a JSON list), and the JSON of
    its own items, in order, by their ids."""

    body: bytes
    input_items: bytes
    own_items: Mapping[str, bytes]

    @property
    def num_bytes(self) -> int:
        """The memory that it takes."""
        own = sum(len(item) + _ITEM_OVERHEAD_BYTES for item in self.own_items.values())
        return len(self.body) + len(self.input_items) + own + _OVERHEAD_BYTES


class ResponseStore:
    """Finished responses by id, and their own items by theirs. Beyond `max_bytes` those that nobody asked for the
    longest time are forgotten."""

    def __init__(self, max_bytes: int = MAX_STORED_BYTES):
        self._max_bytes = max_bytes
        self._stored: OrderedDict[str, Stored] = OrderedDict()
        self._response_of_item: dict[str, str] = {}
        self._num_bytes = 0

    def put(self, response_id: str, stored: Stored) -> None:
        """Keep a response."""
        self._stored[response_id] = stored
        self._response_of_item.update(dict.fromkeys(stored.own_items, response_id))
        self._num_bytes += stored.num_bytes
        while self._num_bytes > self._max_bytes:
            self._forget_contents(self._stored.popitem(last=False)[1])

    def get(self, response_id: str, param: str | None = None) -> Stored:
        """A finished response. Raises NotFound, which names the field `param`."""
        try:
            self._stored.move_to_end(response_id)
            return self._stored[response_id]
        except KeyError as error:
            raise NotFound(
                f"there is no response {shown(response_id)}; it was not stored, or others have taken its place", param
            ) from error

    def get_item(self, item_id: str, param: str | None = None) -> bytes:
        """The JSON of an item of a finished response's own. Raises NotFound, which names the field `param`."""
        response_id = self._response_of_item.get(item_id)
        if response_id is None:
            raise NotFound(
                f"Item with id {shown(item_id)} not found: its response was not stored, or others have taken its "
                "place; send the item itself",
                param,
            )
        return self.get(response_id, param).own_items[item_id]

    def delete(self, response_id: str) -> None:
        """Forget a response. Raises NotFound."""
        self._forget_contents(self.get(response_id))
        del self._stored[response_id]

    def _forget_contents(self, stored: Stored) -> None:
        self._num_bytes -= stored.num_bytes
        for item_id in stored.own_items:
            del self._response_of_item[item_id]
