"""Responses that are kept for later, in bounded memory. Knows bytes and ids, not what they mean."""

from collections import OrderedDict
from dataclasses import dataclass

from server.api.fields import shown
from server.errors import NotFound

MAX_STORED_BYTES = 64 * 2**20
# What a stored response takes besides its bytes, roughly.
_OVERHEAD_BYTES = 1024


@dataclass(frozen=True)
class Stored:
    """A finished response: its JSON, and the items of the whole conversation (a JSON list): the first `num_input` of
    them it was made of, the others are its own."""

    body: bytes
    items: bytes
    num_input: int

    @property
    def num_bytes(self) -> int:
        """The memory that it takes."""
        return len(self.body) + len(self.items) + _OVERHEAD_BYTES


class ResponseStore:
    """Finished responses by id. Beyond `max_bytes` those that nobody asked for the longest time are forgotten."""

    def __init__(self, max_bytes: int = MAX_STORED_BYTES):
        self._max_bytes = max_bytes
        self._stored: OrderedDict[str, Stored] = OrderedDict()
        self._num_bytes = 0

    def put(self, response_id: str, stored: Stored) -> None:
        """Keep a response."""
        self._stored[response_id] = stored
        self._num_bytes += stored.num_bytes
        while self._num_bytes > self._max_bytes:
            self._num_bytes -= self._stored.popitem(last=False)[1].num_bytes

    def get(self, response_id: str, param: str | None = None) -> Stored:
        """A finished response. Raises NotFound, which names the field `param`."""
        try:
            self._stored.move_to_end(response_id)
            return self._stored[response_id]
        except KeyError as error:
            raise NotFound(
                f"there is no response {shown(response_id)}; it was not stored, or others have taken its place", param
            ) from error

    def delete(self, response_id: str) -> None:
        """Forget a response. Raises NotFound."""
        self._num_bytes -= self.get(response_id).num_bytes
        del self._stored[response_id]
