"""What stands in for a tokenizer that was not loaded: ids go in and out, and whoever needs text hears why there is
none."""

import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

from server.errors import InvalidRequest
from server.tokenizer import Tokenizer


class NoTokenizer(Tokenizer):
    """A tokenizer without tokens. Raises InvalidRequest for text; ids stand for no bytes."""

    def __init__(self) -> None:
        self.description = {}
        self.special_ids = frozenset()
        self.vocab_size = 0
        self.longest_token_len = sys.maxsize

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Never."""
        raise _refusal()

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Never."""
        raise _refusal()

    def token_bytes(self, token_id: int) -> bytes:
        """None."""
        return b""

    def token_id(self, token: str) -> int | None:
        """None."""
        return None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] = MappingProxyType({}),
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
    ) -> NoReturn:
        """Never."""
        raise _refusal()


def check_speaks(tokenizer: Tokenizer) -> None:
    """Raise InvalidRequest, for a request that is about text, if there is no tokenizer."""
    if isinstance(tokenizer, NoTokenizer):
        raise _refusal()


def _refusal() -> InvalidRequest:
    return InvalidRequest(
        "this server has no tokenizer (--skip-tokenizer-init), so it takes and gives no text; send token ids to "
        "/generate or /inference/v1/generate, without stop strings"
    )
