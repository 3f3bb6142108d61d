"""What a request may call: `tools`, `tool_choice`, `parallel_tool_calls`, and what they demand of the output.

`functions` and `function_call` are the older names for tools of which one is called at most.
Every mistake is an InvalidRequest. Knows neither messages nor HTTP.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from server.api.fields import Fields, decode_json, known_fields, shown, split_list
from server.api.message_parser import MAX_NAME_CHARS
from server.api.tool_schemas import NotEnforced, enforceable
from server.errors import InvalidRequest
from server.messages import Constraint

_NAMES, _OLDER_NAMES = ("tools", "tool_choice"), ("functions", "function_call")
TOOL_FIELDS = (*_NAMES, "parallel_tool_calls", *_OLDER_NAMES)
MAX_TOOLS = 1024
# Together: definitions are prompt text, of which a few hundred kB fill any context.
MAX_TOOLS_BYTES = 2**20
MAX_SCHEMA_DEPTH = 64
NONE, AUTO, REQUIRED, NAMED = "none", "auto", "required", "named"
ALLOWED = "allowed_tools"
JSON_TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")

_TOOL = known_fields("type", "function")
_FUNCTION = known_fields("name", "description", "parameters", "strict")
_CHOICE = known_fields("type", "function", "allowed_tools", "mode", "tools", "name")
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
_LENGTHS = {"minLength", "maxLength"}
_STRING_RULES = {"pattern", "format", "enum", "const"}
# Where the type stands if not in the schema itself.
_ELSEWHERE = {"$ref", "anyOf", "oneOf", "allOf", "not"}
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}
_SHOWN_CHARS = 120
_START_OF_FUNCTION = "<function="


@dataclass(frozen=True, kw_only=True)
class Tool:
    """One tool, which stands at `where` in the request. `definition` is how the chat template knows it, `schema` what
    its arguments must match as far as a grammar enforces it."""

    where: str
    name: str
    schema: dict[str, Any]
    is_strict: bool
    definition: dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """Whether the model calls tools: `kind` is one of the four above, `names` are those it may call, None: all."""

    kind: str
    names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Tools:
    """The tools of a request. `definitions` are what the client sent, for the chat template; `schemas` has the
    parameters of each by name, `strict` the names whose arguments must match them. `choice` is one of the four above;
    `allowed` are the names of the tools that may be called, None: all. In the `is_older` form they are functions."""

    definitions: list[dict[str, Any]]
    schemas: Mapping[str, dict[str, Any]]
    strict: frozenset[str]
    choice: str
    allowed: tuple[str, ...] | None
    is_parallel: bool
    is_older: bool = False

    @property
    def choice_name(self) -> str:
        """The field that has the choice."""
        return (_OLDER_NAMES if self.is_older else _NAMES)[1]


def read_tools(fields: Fields) -> Tools | None:
    """The tools that a request offers; None for none, or if they are not to be called. Raises InvalidRequest."""
    if any(map(fields.has, _OLDER_NAMES)):
        newer = next(filter(fields.has, _NAMES), None)
        if newer is not None:
            raise InvalidRequest(f"{newer} is given with functions or function_call, its older names; give one", newer)
        return build_tools(fields, _read_older_choice(fields), False, _read_older_tool, is_older=True)
    return build_tools(fields, _read_choice(fields), fields.boolean("parallel_tool_calls", True), _read_tool)


def build_tools(
    fields: Fields,
    choice: Choice,
    is_parallel: bool,
    read_tool: Callable[[bytes, str], Tool],
    is_older: bool = False,
) -> Tools | None:
    """The same where `tool_choice` and the entries of `tools` have another form: `read_tool` makes a tool of an entry
    and its place."""
    tools, tool_choice = _OLDER_NAMES if is_older else _NAMES
    is_there = fields.has(tools)
    if not is_there or not split_list(tools, fields.raw(tools), MAX_TOOLS):
        is_idle = choice in (Choice(NONE), Choice(AUTO) if is_there else Choice(NONE))
        if fields.has(tool_choice) and not is_idle:
            message = f"{tool_choice} is {choice.kind} without {tools}; give {tools} or leave it out"
            raise InvalidRequest(message, tool_choice)
        return None
    definitions, schemas, strict = _read_definitions(tools, fields.raw(tools), read_tool)
    unknown = next((name for name in choice.names or () if name not in schemas), None)
    if unknown is not None:
        raise InvalidRequest(
            f"{tool_choice} names the function {shown(unknown)}, {tools} has {shown(', '.join(schemas))}", tool_choice
        )
    if choice.kind == NONE:
        return None
    return Tools(definitions, schemas, strict, choice.kind, choice.names, is_parallel, is_older)


def tool_constraint(tools: Tools, after_token_id: int | None) -> Constraint | None:
    """What the output must match so that it calls what `tool_choice` demands, and strict tools by their schemas.

    The text before `after_token_id` is free. None where any text will do. Of a tool that must be called but is not
    strict, keywords that no grammar enforces are passed over, such as `uniqueItems`, `contains`, `not`, `if` and
    `dependentRequired`, and what cannot be had together; a strict one that has them is refused when it is read. `oneOf`
    is enforced as `anyOf` for both.
    """
    if tools.choice == AUTO and not tools.strict and tools.allowed is None:
        return None
    names = tools.schemas if tools.allowed is None else tools.allowed
    # A call without its envelope is a call too, and one may follow another inside of it.
    others = [] if tools.allowed is None else [_START_OF_FUNCTION]
    tags = [_tag(name, tools.schemas[name], tools.choice != AUTO or name in tools.strict, others) for name in names]
    calls: dict[str, Any]
    if tools.choice == AUTO:
        calls = {"type": "triggered_tags", "triggers": ["<tool_call>"], "tags": tags, "excludes": others}
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


def _tag(name: str, schema: dict[str, Any], is_strict: bool, others: list[str]) -> dict[str, Any]:
    content: dict[str, Any] = {"type": "any_text", "excludes": others}
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
    excluded, as markup is here. With a pattern it excludes nothing, so these strings do without `<`. What may be of any
    type is a string."""
    if not isinstance(schema, dict):
        return schema
    has_length = bool(_LENGTHS & schema.keys()) and not _STRING_RULES & schema.keys()
    kind = schema.get("type", None if _ELSEWHERE & schema.keys() else "string")
    if has_length and isinstance(kind, list):
        return {"anyOf": [spell_lengths({**schema, "type": one}) for one in kind]}
    spelt = dict(schema)
    if has_length and kind == "string":
        pattern = _length_pattern(schema.get("minLength", 0), schema.get("maxLength"))
        spelt |= {"type": kind, "pattern": pattern}
    for keyword in (*_SCHEMAS, *_SCHEMA_LISTS, *_SCHEMA_MAPS):
        child = schema.get(keyword)
        if isinstance(child, list):
            spelt[keyword] = [spell_lengths(one) for one in child]
        elif isinstance(child, dict):
            is_schema = keyword in _SCHEMAS
            spelt[keyword] = spell_lengths(child) if is_schema else {k: spell_lengths(v) for k, v in child.items()}
    return spelt


def _length_pattern(least: int, most: int | None) -> str:
    """Texts of so many characters. A space at the edge of a value may be taken for markup, so none is there."""
    edge, limit = "[^< \\t\\r\\n]", "" if most is None else most - 2
    options = [""] if least == 0 else []
    if least <= 1 and most != 0:
        options.append(edge)
    if most is None or most > 1:
        options.append(f"{edge}[^<]{{{max(0, least - 2)},{limit}}}{edge}")
    return f"^({'|'.join(options)})$"


def _read_choice(fields: Fields) -> Choice:
    """`tool_choice`; auto when absent."""
    rule = "one of none, auto, required, or an object that names a function"
    if not fields.has("tool_choice"):
        return Choice(AUTO)
    value = fields.value("tool_choice")
    if isinstance(value, str):
        if value not in (NONE, AUTO, REQUIRED):
            raise InvalidRequest(f"tool_choice is {shown(value)}, it must be {rule}", "tool_choice")
        return Choice(value)
    if isinstance(value, dict) and value.get("type") == ALLOWED:
        return read_allowed(fields)
    if not isinstance(value, dict) or value.get("type") != "function":
        raise InvalidRequest(f"tool_choice is {shown(value)}, it must be {rule}", "tool_choice")
    choice = Fields(_CHOICE, fields.raw("tool_choice"), "tool_choice")
    function = Fields(_FUNCTION, choice.raw("function") or b"null", "tool_choice.function")
    name = function.text("name", "")
    if not name:
        raise InvalidRequest("tool_choice.function.name is missing, it must be one of tools", "tool_choice")
    return Choice(NAMED, (name,))


def read_allowed(fields: Fields) -> Choice:
    """A `tool_choice` among some of the tools. The list and its entries have a form with objects around them, and one
    without."""
    choice = Fields(_CHOICE, fields.raw("tool_choice"), "tool_choice")
    if choice.has(ALLOWED):
        choice = Fields(_CHOICE, choice.raw(ALLOWED), choice.name(ALLOWED))
    mode, where = choice.value("mode"), choice.name("tools")
    if mode not in (AUTO, REQUIRED):
        raise mistake(choice.name("mode"), mode, "auto or required")
    entries = split_list(where, choice.raw("tools"), MAX_TOOLS) if choice.has("tools") else []
    if not entries:
        raise InvalidRequest(f"{where} is empty, it must name at least one of tools", where)
    names = [_read_allowed_name(Fields(_CHOICE, entry, f"{where}[{i}]")) for i, entry in enumerate(entries)]
    return Choice(mode, tuple(dict.fromkeys(names)))


def _read_allowed_name(tool: Fields) -> str:
    if tool.value("type") != "function":
        raise mistake(tool.name("type"), tool.value("type"), "'function'")
    function = Fields(_FUNCTION, tool.raw("function"), tool.name("function")) if tool.has("function") else tool
    return function.text("name", "")


def _read_older_choice(fields: Fields) -> Choice:
    """`function_call`; auto when absent."""
    raw = fields.raw("function_call") or b'"auto"'
    if raw[:1] == b"{":
        return Choice(NAMED, (Fields(_FUNCTION, raw, "function_call").text("name", ""),))
    value = fields.value("function_call") or AUTO
    if value not in (NONE, AUTO):
        rule = "none, auto, or an object that names a function"
        raise InvalidRequest(f"function_call is {shown(value)}, it must be {rule}", "function_call")
    return Choice(value)


def _read_definitions(
    name: str, raw: bytes, read_tool: Callable[[bytes, str], Tool]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]], frozenset[str]]:
    """(definitions, parameters by name, names of strict ones) of the tools in the field `name`."""
    if len(raw) > MAX_TOOLS_BYTES:
        raise InvalidRequest(f"{name} has {len(raw)} bytes of JSON, the limit is {MAX_TOOLS_BYTES}", name)
    entries = split_list(name, raw, MAX_TOOLS)
    definitions, schemas, strict = [], {}, set()
    for i, entry in enumerate(entries):
        tool = read_tool(entry, f"{name}[{i}]")
        if tool.name in schemas:
            raise InvalidRequest(f"{tool.where}.name is {shown(tool.name)}, which an earlier tool has", name)
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


def _read_older_tool(entry: bytes, where: str) -> Tool:
    return read_function(Fields(_FUNCTION, entry, where), "parameters")


def read_function(function: Fields, schema_field: str) -> Tool:
    """A tool, from an object with a name, a description, the schema of the parameters and whether it is strict."""
    name = function.text("name", "")
    if not _NAME.fullmatch(name):
        rule = f"1..{MAX_NAME_CHARS} characters without spaces, quotes and angle brackets"
        raise mistake(function.name("name"), name, rule)
    description, parameters, where = function.text("description", ""), function.mapping(schema_field), function.name("")
    check_schema(where + schema_field, parameters)
    if parameters.get("type", "object") != "object":
        raise mistake(f"{where}{schema_field}.type", parameters["type"], "'object'")
    is_strict = function.boolean("strict", False)
    try:
        # As OpenAI has it, a function has no arguments where nothing is said of them.
        schema = enforceable(parameters, is_strict) if function.has(schema_field) else _NO_ARGUMENTS
    except NotEnforced as error:
        raise mistake(f"{where}{schema_field}{error.place}", error.value, error.rule) from error
    definition = {"name": name, "description": description, "parameters": parameters}
    definition = {key: value for key, value in definition.items() if value}
    return Tool(
        where=where.removesuffix("."),
        name=name,
        schema=schema,
        is_strict=is_strict,
        definition={"type": "function", "function": definition},
    )


def check_schema(name: str, schema: Any, depth: int = 0) -> None:
    """Raise InvalidRequest, naming the place, for what is no JSON schema by the keywords that matter here."""
    if isinstance(schema, bool):
        return
    if depth > MAX_SCHEMA_DEPTH:
        message = f"{_place(name)} is nested too deeply, the limit is {MAX_SCHEMA_DEPTH} schemas"
        raise InvalidRequest(message, _field(name))
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
    """The error for a value somewhere in the tools."""
    return InvalidRequest(f"{_place(name)} is {shown(value)}, it must be {rule}", _field(name))


def _field(name: str) -> str:
    """The field of the request that a place is in."""
    return name.partition("[")[0]


def _place(name: str) -> str:
    """A place inside a schema, whose keys may be as long as the client likes."""
    return name if len(name) <= _SHOWN_CHARS else "..." + name[-_SHOWN_CHARS:]
