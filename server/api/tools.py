"""What a request may call: `tools`, `tool_choice`, `parallel_tool_calls`, and what they demand of the output.

Every mistake is an InvalidRequest. Knows neither messages nor HTTP.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from server.api.fields import Fields, decode_json, known_fields, shown, split_list
from server.api.message_parser import MAX_NAME_CHARS
from server.errors import InvalidRequest
from server.messages import Constraint

TOOL_FIELDS = ("tools", "tool_choice", "parallel_tool_calls")
MAX_TOOLS = 1024
# Together: definitions are prompt text, of which a few hundred kB fill any context.
MAX_TOOLS_BYTES = 2**20
MAX_SCHEMA_DEPTH = 64
NONE, AUTO, REQUIRED, NAMED = "none", "auto", "required", "named"
JSON_TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")

_TOOL = known_fields("type", "function")
_FUNCTION = known_fields("name", "description", "parameters", "strict")
_CHOICE = known_fields("type", "function")
_NAME = re.compile(rf"[^\s<>\"'`]{{1,{MAX_NAME_CHARS}}}")
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties", "not")
_KEYWORDS: dict[str, tuple[type, str]] = {
    "$ref": (str, "a string"),
    "required": (list, "a list"),
    "enum": (list, "a list"),
    "minLength": (int, "an integer"),
    "maxLength": (int, "an integer"),
}
_STRING_RULES = {"pattern", "format", "enum", "const"}
_SHOWN_CHARS = 120


@dataclass(frozen=True, kw_only=True)
class Tool:
    """One tool, which stands at `where` in the request. `definition` is how the chat template knows it."""

    where: str
    name: str
    schema: dict[str, Any]
    is_strict: bool
    definition: dict[str, Any]


@dataclass(frozen=True)
class Tools:
    """The tools of a request. `definitions` are what the client sent, for the chat template; `schemas` has the
    parameters of each by name, `strict` the names whose arguments must match them. `choice` is one of the four above;
    the tool it names is `named`."""

    definitions: list[dict[str, Any]]
    schemas: Mapping[str, dict[str, Any]]
    strict: frozenset[str]
    choice: str
    named: str | None
    is_parallel: bool


def read_tools(fields: Fields) -> Tools | None:
    """The tools that a request offers; None for none, or if they are not to be called. Raises InvalidRequest."""
    choice, named = _read_choice(fields)
    return build_tools(fields, choice, named, fields.boolean("parallel_tool_calls", True), _read_tool)


def build_tools(
    fields: Fields, choice: str, named: str | None, is_parallel: bool, read_tool: Callable[[bytes, str], Tool]
) -> Tools | None:
    """The same where `tool_choice` and the entries of `tools` have another form: `read_tool` makes a tool of an entry
    and its place."""
    if not fields.has("tools"):
        if choice in (AUTO, REQUIRED, NAMED) and fields.has("tool_choice"):
            raise InvalidRequest(f"tool_choice is {choice} without tools; give tools or leave it out", "tool_choice")
        return None
    definitions, schemas, strict = _read_definitions(fields.raw("tools"), read_tool)
    if named is not None and named not in schemas:
        raise InvalidRequest(
            f"tool_choice names the function {shown(named)}, tools has {shown(', '.join(schemas))}", "tool_choice"
        )
    if choice == NONE:
        return None
    return Tools(definitions, schemas, strict, choice, named, is_parallel)


def tool_constraint(tools: Tools, after_token_id: int | None) -> Constraint | None:
    """What the output must match so that it calls what `tool_choice` demands, and strict tools by their schemas.

    The text before `after_token_id` is free. None where any text will do.
    """
    if tools.choice == AUTO and not tools.strict:
        return None
    names = [tools.named] if tools.named is not None else list(tools.schemas)
    tags = [_tag(name, tools.schemas[name], tools.choice != AUTO or name in tools.strict) for name in names]
    calls: dict[str, Any]
    if tools.choice == AUTO:
        calls = {"type": "triggered_tags", "triggers": ["<tool_call>"], "tags": tags}
        return _structural_tag(calls, after_token_id)
    calls = {
        "type": "tags_with_separator",
        "separator": "\n",
        "tags": tags,
        "at_least_one": True,
        "stop_after_first": tools.choice == NAMED or not tools.is_parallel,
    }
    # Between the end of thinking and a call the model writes an empty line.
    lines = {"type": "regex", "pattern": "\\n{0,2}"}
    return _structural_tag({"type": "sequence", "elements": [lines, calls]}, after_token_id)


def _structural_tag(form: dict[str, Any], after_token_id: int | None) -> Constraint:
    text = msgspec.json.encode({"type": "structural_tag", "format": form}).decode()
    return Constraint("structural_tag", text, after_token_id, "tools")


def _tag(name: str, schema: dict[str, Any], is_strict: bool) -> dict[str, Any]:
    content: dict[str, Any] = {"type": "any_text"}
    if is_strict:
        # Values with these would not be read back as they are.
        markup = ["<parameter=", "</function>", "</tool_call>"]
        content = {"type": "json_schema", "json_schema": spell_lengths(schema), "style": "qwen_xml", "excludes": markup}
        content["max_whitespace_cnt"] = 1
    return {
        "type": "tag",
        "begin": f"<tool_call>\n<function={name}>",
        "content": content,
        "end": "</function>\n</tool_call>",
    }


def spell_lengths(schema: Any) -> Any:
    """The same, with the lengths of strings as patterns: the compiler of grammars passes over lengths where texts are
    excluded, as markup is here. With a pattern it excludes nothing, so these strings do without `<`."""
    if not isinstance(schema, dict):
        return schema
    spelt = dict(schema)
    has_length = schema.get("type") == "string" and ("minLength" in schema or "maxLength" in schema)
    if has_length and not _STRING_RULES & schema.keys():
        spelt["pattern"] = _length_pattern(schema.get("minLength", 0), schema.get("maxLength"))
    for keyword in (*_SCHEMAS, *_SCHEMA_LISTS, *_SCHEMA_MAPS):
        child = schema.get(keyword)
        if isinstance(child, list):
            spelt[keyword] = [spell_lengths(one) for one in child]
        elif isinstance(child, dict):
            is_schema = keyword in _SCHEMAS
            spelt[keyword] = spell_lengths(child) if is_schema else {k: spell_lengths(v) for k, v in child.items()}
    return spelt


def _length_pattern(least: int, most: int | None) -> str:
    """Texts of so many characters. A line end at the edge of a value may be taken for markup, so none is there."""
    edge, limit = "[^<\\n]", "" if most is None else most - 2
    options = [""] if least == 0 else []
    if least <= 1 and most != 0:
        options.append(edge)
    if most is None or most > 1:
        options.append(f"{edge}[^<]{{{max(0, least - 2)},{limit}}}{edge}")
    return f"^({'|'.join(options)})$"


def _read_choice(fields: Fields) -> tuple[str, str | None]:
    """(`tool_choice`, the function it names); auto when absent."""
    rule = "one of none, auto, required, or an object that names a function"
    if not fields.has("tool_choice"):
        return AUTO, None
    value = fields.value("tool_choice")
    if isinstance(value, str):
        if value not in (NONE, AUTO, REQUIRED):
            raise InvalidRequest(f"tool_choice is {shown(value)}, it must be {rule}", "tool_choice")
        return value, None
    if not isinstance(value, dict) or value.get("type") != "function":
        raise InvalidRequest(f"tool_choice is {shown(value)}, it must be {rule}", "tool_choice")
    choice = Fields(_CHOICE, fields.raw("tool_choice"), "tool_choice")
    function = Fields(_FUNCTION, choice.raw("function") or b"null", "tool_choice.function")
    name = function.text("name", "")
    if not name:
        raise InvalidRequest("tool_choice.function.name is missing, it must be one of tools", "tool_choice")
    return NAMED, name


def _read_definitions(
    raw: bytes, read_tool: Callable[[bytes, str], Tool]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]], frozenset[str]]:
    """(definitions, parameters by name, names of strict ones) of `tools`."""
    if len(raw) > MAX_TOOLS_BYTES:
        raise InvalidRequest(f"tools has {len(raw)} bytes of JSON, the limit is {MAX_TOOLS_BYTES}", "tools")
    entries = split_list("tools", raw, MAX_TOOLS)
    if not entries:
        raise InvalidRequest("tools is [], it must be a list of at least one entry, or be left out", "tools")
    definitions, schemas, strict = [], {}, set()
    for i, entry in enumerate(entries):
        tool = read_tool(entry, f"tools[{i}]")
        if tool.name in schemas:
            raise InvalidRequest(f"{tool.where}.name is {shown(tool.name)}, which an earlier tool has", "tools")
        definitions.append(tool.definition)
        schemas[tool.name] = tool.schema
        if tool.is_strict:
            strict.add(tool.name)
    return definitions, schemas, frozenset(strict)


def _read_tool(entry: bytes, where: str) -> Tool:
    fields = Fields(_TOOL, entry, where)
    kind = fields.value("type")
    if kind != "function":
        raise mistake(fields.name("type"), kind, "'function'")
    function = Fields(_FUNCTION, fields.raw("function") or b"null", fields.name("function"))
    return replace(read_function(function, "parameters"), definition=decode_json(where, entry, dict, "a JSON object"))


def read_function(function: Fields, schema_field: str) -> Tool:
    """A tool, from an object with a name, a description, the schema of the parameters and whether it is strict."""
    name = function.text("name", "")
    if not _NAME.fullmatch(name):
        rule = f"1..{MAX_NAME_CHARS} characters without spaces, quotes and angle brackets"
        raise mistake(function.name("name"), name, rule)
    description, schema, where = function.text("description", ""), function.mapping(schema_field), function.name("")
    check_schema(where + schema_field, schema)
    if schema.get("type", "object") != "object":
        raise mistake(f"{where}{schema_field}.type", schema["type"], "'object'")
    definition = {"name": name, "description": description, "parameters": schema}
    definition = {key: value for key, value in definition.items() if value}
    return Tool(
        where=where.removesuffix("."),
        name=name,
        schema=schema,
        is_strict=function.boolean("strict", False),
        definition={"type": "function", "function": definition},
    )


def check_schema(name: str, schema: Any, depth: int = 0) -> None:
    """Raise InvalidRequest, naming the place, for what is no JSON schema by the keywords that matter here."""
    if isinstance(schema, bool):
        return
    if depth > MAX_SCHEMA_DEPTH:
        raise InvalidRequest(f"{_place(name)} is nested too deeply, the limit is {MAX_SCHEMA_DEPTH} schemas", "tools")
    if not isinstance(schema, dict):
        raise mistake(name, schema, "a JSON schema, which is an object")
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in JSON_TYPES:
            raise mistake(f"{name}.type", kind, "one of " + ", ".join(JSON_TYPES))
    for keyword, (kind, rule) in _KEYWORDS.items():
        if keyword in schema and not isinstance(schema[keyword], kind):
            raise mistake(f"{name}.{keyword}", schema[keyword], rule)
    for place, child in _children(name, schema):
        check_schema(place, child, depth + 1)


def _children(name: str, schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas inside a schema, each with its place."""
    for keyword in _SCHEMAS:
        if keyword in schema:
            yield f"{name}.{keyword}", schema[keyword]
    for keyword in _SCHEMA_LISTS:
        options = schema.get(keyword, [])
        if not isinstance(options, list):
            raise mistake(f"{name}.{keyword}", options, "a list")
        yield from ((f"{name}.{keyword}[{i}]", option) for i, option in enumerate(options))
    for keyword in _SCHEMA_MAPS:
        named = schema.get(keyword, {})
        if not isinstance(named, dict):
            raise mistake(f"{name}.{keyword}", named, "an object")
        yield from ((f"{name}.{keyword}.{key}", child) for key, child in named.items())


def mistake(name: str, value: Any, rule: str) -> InvalidRequest:
    """The error for a value somewhere in `tools`."""
    return InvalidRequest(f"{_place(name)} is {shown(value)}, it must be {rule}", "tools")


def _place(name: str) -> str:
    """A place inside a schema, whose keys may be as long as the client likes."""
    return name if len(name) <= _SHOWN_CHARS else "..." + name[-_SHOWN_CHARS:]
