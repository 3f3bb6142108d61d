"""The fields by which a request says what its output must look like, in OpenAI's, vLLM's and SGLang's spellings.

`response_format`, `structured_outputs` and the shorter forms all come to one `Constraint`; `allowed_token_ids`,
`bad_words` and `thinking_token_budget` to fields of `SamplingParams`. Whether a grammar compiles the engine says.
Every mistake is an InvalidRequest. Knows neither prompts nor HTTP.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from server.api.fields import Fields, decode_json, known_fields, require_integer, shown, shown_json
from server.api.thinking import END_OF_THINKING
from server.errors import InvalidRequest
from server.messages import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, Constraint
from server.tokenizer import Tokenizer

# Field -> kind of constraint. The names beginning with "guided" are vLLM's older ones, the last three SGLang's.
_SHORT_FORMS = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "regex": "regex",
    "ebnf": "grammar",
    "json_schema": "json_schema",
}
CONSTRAINT_FIELDS = ("response_format", "structured_outputs", *_SHORT_FORMS)
MASK_FIELDS = (*CONSTRAINT_FIELDS, "allowed_token_ids", "bad_words", "thinking_token_budget")
_FORMATS = ("text", "json_object", "json_schema", "structural_tag")
_FORMAT = known_fields("type", "json_schema", "schema", "format", "structures", "triggers")
_JSON_SCHEMA = known_fields("name", "schema", "strict")
_STRUCTURED = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
    "json_object": "json_object",
    "structural_tag": "structural_tag",
}
_STRUCTURED_OUTPUTS = known_fields(*_STRUCTURED)
_STRUCTURE = known_fields("begin", "schema", "end")
_MAX_STRUCTURES = 1024
_MAX_CHOICES = 16384
_NO_BUDGET = -1
# A field that is left empty.
_NOTHING = (b"", b'""')


def read_masks(
    fields: Fields, tokenizer: Tokenizer, vocab_size: int, is_thinking: bool | None = None
) -> dict[str, Any]:
    """The fields of `SamplingParams` that say which tokens may come. Raises InvalidRequest.

    `is_thinking`: the output begins inside the reasoning, so a constraint holds behind it; None where nobody knows.
    """
    budget = fields.integer("thinking_token_budget", _NO_BUDGET, _NO_BUDGET)
    end_id = tokenizer.token_id(END_OF_THINKING)
    if budget != _NO_BUDGET and end_id is None:
        raise InvalidRequest(
            f"thinking_token_budget is given, but this checkpoint has no token {END_OF_THINKING}",
            "thinking_token_budget",
        )
    has_budget = budget != _NO_BUDGET and is_thinking is not False
    return {
        "constraint": read_constraint(fields, end_id if is_thinking else None),
        "allowed_token_ids": _read_allowed(fields, vocab_size),
        "bad_words": _read_bad_words(fields, tokenizer),
        "thinking_budget": budget if has_budget else None,
        "think_end_id": end_id if has_budget else None,
    }


def read_constraint(fields: Fields, after_token_id: int | None = None) -> Constraint | None:
    """What the output must match behind the first `after_token_id`, if anything; one field at most may say so."""
    found: list[Constraint] = []
    for name in CONSTRAINT_FIELDS:
        form = _READERS[name](fields, name) if fields.raw(name) not in _NOTHING else None
        if form is not None:
            found.append(Constraint(*form, after_token_id, name))
            found[-1].check()
    if len(found) > 1:
        first, second = found[0].field, found[1].field
        raise InvalidRequest(f"{first} and {second} are both given; an output can follow one of them", second)
    return found[0] if found else None


def _read_format(fields: Fields, name: str) -> tuple[str, str] | None:
    """(kind, text) of a response_format; nothing for text."""
    form = Fields(_FORMAT, fields.raw(name), name)
    kind = form.value("type")
    if kind not in _FORMATS:
        raise InvalidRequest(f"{name}.type is {shown(kind)}, it must be one of {', '.join(_FORMATS)}", name)
    if kind == "json_object" and form.has("schema"):
        return "json_schema", _read_schema(form, "schema")
    if kind == "json_schema":
        raw = form.raw("json_schema")
        if not raw:
            raise InvalidRequest(f"{name}.json_schema is missing, it must be an object with a schema", name)
        schema = Fields(_JSON_SCHEMA, raw, f"{name}.json_schema")
        schema.text("name", "")
        schema.boolean("strict", False)
        return kind, _read_schema(schema, "schema")
    if kind == "structural_tag":
        return kind, _read_tag_format(form, fields.raw(name).decode())
    return None if kind == "text" else (kind, "")


def _read_tag_format(form: Fields, text: str) -> str:
    """A structural tag as it came, or what its older form (`structures` and `triggers`) means."""
    if form.has("format"):
        return text
    structures, triggers = form.items("structures", _MAX_STRUCTURES), form.items("triggers", _MAX_STRUCTURES)
    if not structures or not triggers:
        raise InvalidRequest(f"{form.name('format')} is missing, it must say what is tagged", "response_format")
    tags = [_read_structure(form.name(f"structures[{i}]"), structure) for i, structure in enumerate(structures)]
    tagged = {"type": "triggered_tags", "triggers": triggers, "tags": tags}
    return msgspec.json.encode({"type": "structural_tag", "format": tagged}).decode()


def _read_structure(name: str, structure: Any) -> dict[str, Any]:
    fields = Fields(_STRUCTURE, msgspec.json.encode(structure), name)
    content = {"type": "json_schema", "json_schema": fields.mapping("schema")}
    return {"type": "tag", "begin": fields.text("begin", ""), "content": content, "end": fields.text("end", "")}


def _read_structured(fields: Fields, name: str) -> tuple[str, str] | None:
    """(kind, text) of structured_outputs, which sets exactly one of its fields."""
    options = Fields(_STRUCTURED_OUTPUTS, fields.raw(name), name)
    given = [option for option in _STRUCTURED if options.has(option) and options.raw(option) != b"false"]
    if len(given) != 1:
        kinds = ", ".join(_STRUCTURED)
        raise InvalidRequest(f"{name} has {shown(', '.join(given))}, it must have exactly one of {kinds}", name)
    if given[0] == "json_object":
        options.boolean("json_object", True)
    return _STRUCTURED[given[0]], _read_text(options, given[0], _STRUCTURED[given[0]])


def _read_short_form(fields: Fields, name: str) -> tuple[str, str] | None:
    return _SHORT_FORMS[name], _read_text(fields, name, _SHORT_FORMS[name])


def _read_text(fields: Fields, name: str, kind: str) -> str:
    """The text of a constraint of this kind, from the field that has it."""
    if kind in ("json_schema", "structural_tag"):
        return _read_schema(fields, name)
    if kind == "choice":
        choices = fields.items(name, _MAX_CHOICES)
        if not choices or not all(isinstance(choice, str) for choice in choices):
            raise InvalidRequest(f"{fields.name(name)} must be a list of at least one string", fields.name(name))
        return msgspec.json.encode(choices).decode()
    return "" if kind == "json_object" else fields.text(name, "")


def _read_schema(fields: Fields, name: str) -> str:
    """JSON that is given as an object, or as a string."""
    raw = fields.raw(name)
    if raw[:1] == b'"':
        return decode_json(fields.name(name), raw, str, "a string")
    if raw[:1] != b"{" and raw not in (b"true", b"false"):
        raise InvalidRequest(
            f"{fields.name(name)} is {shown_json(raw)}, it must be an object, or a string that has one",
            fields.name(name),
        )
    return raw.decode()


def _read_allowed(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    ids = fields.items("allowed_token_ids", vocab_size)
    if fields.has("allowed_token_ids") and not ids:
        raise InvalidRequest("allowed_token_ids is [], then no token could come; leave it out", "allowed_token_ids")
    return tuple(require_integer(f"allowed_token_ids[{i}]", value, 0, vocab_size - 1) for i, value in enumerate(ids))


def _read_bad_words(fields: Fields, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The words as tokens, each as it begins a line and as it follows a space."""
    words = fields.items("bad_words", MAX_BAD_WORDS // 2)
    for i, word in enumerate(words):
        if not isinstance(word, str) or not word.strip():
            raise InvalidRequest(f"bad_words[{i}] is {shown(word)}, it must be a string with a word", "bad_words")
    texts = [text for word in words for text in (word.lstrip(), " " + word.lstrip())]
    sequences = [tuple(ids) for ids in tokenizer.encode_batch(texts, add_special_tokens=False)] if texts else []
    longest = max(map(len, sequences), default=0)
    if longest > MAX_BAD_WORD_TOKENS:
        raise InvalidRequest(
            f"bad_words has a word of {longest} tokens, the limit is {MAX_BAD_WORD_TOKENS}", "bad_words"
        )
    return tuple(dict.fromkeys(sequences))


_READERS: dict[str, Callable[[Fields, str], tuple[str, str] | None]] = {
    "response_format": _read_format,
    "structured_outputs": _read_structured,
    **dict.fromkeys(_SHORT_FORMS, _read_short_form),
}
