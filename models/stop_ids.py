"""The token ids that end a sequence, from all the places a checkpoint names them, and begin a turn. No torch.

Each place alone may be incomplete: Qwen3.5's config.json names `<|endoftext|>` only, its tokenizer `<|im_end|>` only,
and some checkpoints have no generation_config.json.
"""

from pathlib import Path
from typing import Any

from models.config import read_json
from models.errors import CheckpointError

TURN_TOKEN = "<|im_start|>"


def read_stop_ids(directory: str | Path) -> tuple[int, ...]:
    """eos_token_id of generation_config.json, of config.json and of its text_config, and the tokenizer's end token.

    Sorted; empty where nothing is named. Raises CheckpointError for an id that is no integer or a broken file.
    """
    path = Path(directory)
    config = _read_optional(path / "config.json")
    places = {
        "generation_config.json": _read_optional(path / "generation_config.json"),
        "config.json": config,
        "config.json: text_config": config.get("text_config") or {},
    }
    ids = {token_id for place, fields in places.items() for token_id in _eos_ids(place, fields)}
    return tuple(sorted(ids | _tokenizer_eos_ids(path)))


def read_turn_ids(directory: str | Path) -> frozenset[int]:
    """The added token of tokenizer.json that begins a turn of a chat, `<|im_start|>`; empty where there is none."""
    tokenizer = _read_optional(Path(directory) / "tokenizer.json")
    added = tokenizer.get("added_tokens") or []
    return frozenset(entry["id"] for entry in added if entry.get("content") == TURN_TOKEN)


def read_added_ids(directory: str | Path) -> frozenset[int]:
    """The ids of tokenizer.json's added tokens: all special ones, and those that mark thinking and tool calls."""
    tokenizer = _read_optional(Path(directory) / "tokenizer.json")
    return frozenset(entry["id"] for entry in tokenizer.get("added_tokens") or [])


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _eos_ids(place: str, fields: Any) -> list[int]:
    value = fields.get("eos_token_id") if isinstance(fields, dict) else None
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
        raise CheckpointError(f"{place}: eos_token_id is {value!r}, an integer or a list of integers is needed")
    return ids


def _tokenizer_eos_ids(path: Path) -> set[int]:
    """The id of tokenizer_config.json's eos_token, looked up in tokenizer.json: added tokens first, then the words."""
    token = _read_optional(path / "tokenizer_config.json").get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    if text is None:
        return set()
    tokenizer = _read_optional(path / "tokenizer.json")
    added = {entry.get("content"): entry.get("id") for entry in tokenizer.get("added_tokens") or []}
    words = (tokenizer.get("model") or {}).get("vocab")
    found = added.get(text, words.get(text) if isinstance(words, dict) else None)
    return set() if found is None else {found}
