"""Tools of a request: what is read, what is refused, and the constraint that makes the model call them."""

import json
from typing import Any

import msgspec
import pytest

from server.api.fields import Fields, known_fields
from server.api.tool_arguments import ArgumentWriter
from server.api.tools import (
    AUTO,
    MAX_SCHEMA_DEPTH,
    MAX_TOOLS_BYTES,
    NAMED,
    REQUIRED,
    TOOL_FIELDS,
    Tools,
    read_tools,
    tool_constraint,
)
from server.errors import InvalidRequest
from server.messages import Constraint

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["celsius", "kelvin"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def tool(name: str = "weather", **fields: Any) -> dict[str, Any]:
    """One entry of `tools`."""
    return {"type": "function", "function": {"name": name, **fields}}


WEATHER, CLOCK = tool(description="The weather", parameters=PARAMETERS), tool("clock")
CHOOSE_CLOCK = {"type": "function", "function": {"name": "clock"}}
FLAT_CLOCK = {"type": "function", "name": "clock"}


def allow(mode: str, *tools: Any) -> dict[str, Any]:
    """A choice among some of the tools."""
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def read(**values: Any) -> Tools | None:
    """The tools of a request."""
    return read_tools(Fields(known_fields(*TOOL_FIELDS), msgspec.json.encode(values)))


def test_definitions_stay_as_they_came() -> None:
    extra = {**tool(strict=True, parameters=None), "x": {"deep": [1]}}
    tools = read(tools=[WEATHER, CLOCK, {**extra, "function": {**extra["function"], "name": "other", "y": None}}])
    assert tools is not None
    assert tools.definitions[:2] == [WEATHER, CLOCK]
    assert tools.definitions[2]["x"] == {"deep": [1]} and "y" in tools.definitions[2]["function"]
    nothing = {"type": "object", "properties": {}}
    assert tools.schemas == {"weather": PARAMETERS, "clock": nothing, "other": nothing}
    assert tools.strict == {"other"}
    assert (tools.choice, tools.allowed, tools.is_parallel) == (AUTO, None, True)


@pytest.mark.parametrize(
    ("values", "choice"),
    [
        ({"tool_choice": "auto"}, (AUTO, None)),
        ({"tool_choice": None}, (AUTO, None)),
        ({"tool_choice": "required"}, (REQUIRED, None)),
        ({"tool_choice": CHOOSE_CLOCK}, (NAMED, ("clock",))),
        ({"tool_choice": allow("auto", CHOOSE_CLOCK)}, (AUTO, ("clock",))),
        ({"tool_choice": allow("required", CHOOSE_CLOCK, CHOOSE_CLOCK)}, (REQUIRED, ("clock",))),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [FLAT_CLOCK]}}, (AUTO, ("clock",))),
    ],
)
def test_the_choice_is_auto_unless_it_is_said(values: Any, choice: tuple[str, tuple[str, ...] | None]) -> None:
    tools = read(tools=[WEATHER, CLOCK], parallel_tool_calls=False, **values)
    assert tools is not None
    assert (tools.choice, tools.allowed, tools.is_parallel) == (*choice, False)
    assert tools.definitions == [WEATHER, CLOCK]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"tools": None},
        {"tool_choice": "none"},
        {"tools": [CLOCK], "tool_choice": "none"},
        {"tools": []},
        {"tools": [], "tool_choice": None, "parallel_tool_calls": True},
        {"tools": [], "tool_choice": "auto"},
        {"tools": [], "tool_choice": "none"},
        {"functions": [], "function_call": "auto"},
    ],
)
def test_no_tools_and_tools_that_are_not_to_be_called_are_the_same(values: Any) -> None:
    assert read(**values) is None


def nested(depth: int) -> dict[str, Any]:
    """A schema of so many levels."""
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tools": [], "tool_choice": "required"}, "tool_choice is required without tools"),
        ({"tools": [], "tool_choice": CHOOSE_CLOCK}, "tool_choice is named without tools"),
        ({"tools": [], "tool_choice": allow("auto", CHOOSE_CLOCK)}, "tool_choice is auto without tools"),
        ({"tools": {}}, "tools is {}, it must be a list"),
        ({"tools": "x"}, "tools is"),
        ({"tools": [5]}, "tools[0] is 5, it must be a JSON object"),
        ({"tools": [{}]}, "tools[0].type is null, it must be 'function'"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type is 'web_search', it must be 'function'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function is null, it must be a JSON object"),
        ({"tools": [CLOCK, tool("")]}, "tools[1].function.name is '', it must be 1..256 characters"),
        ({"tools": [tool("two words")]}, "tools[0].function.name is 'two words'"),
        ({"tools": [tool("a<b>")]}, "without spaces, quotes and angle brackets"),
        ({"tools": [tool("x" * 257)]}, "(257 characters)"),
        ({"tools": [tool(5)]}, "tools[0].function.name is 5, it must be a string"),  # type: ignore[arg-type]
        ({"tools": [CLOCK, CLOCK]}, "tools[1].function.name is 'clock', which an earlier tool has"),
        ({"tools": [tool(description=5)]}, "tools[0].function.description is 5, it must be a string"),
        ({"tools": [tool(strict="yes")]}, "tools[0].function.strict is 'yes', it must be true or false"),
        ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters is a list of 0 entries, it must be an object"),
        ({"tools": [tool(parameters={"type": "string"})]}, "parameters.type is 'string', it must be 'object'"),
        (
            {"tools": [tool(parameters={"type": "thing"})]},
            "parameters.type is 'thing', it must be one of string,",
        ),
        ({"tools": [tool(parameters={"type": ["object", 5]})]}, "parameters.type is 5"),
        ({"tools": [tool(parameters={"properties": []})]}, "parameters.properties is a list of 0 entries"),
        (
            {"tools": [tool(parameters={"properties": {"x": 5}})]},
            "parameters.properties.x is 5, it must be a JSON",
        ),
        (
            {"tools": [tool(parameters={"properties": {"x": {"items": {"type": "int"}}}})]},
            "parameters.properties.x.items.type is 'int'",
        ),
        ({"tools": [tool(parameters={"anyOf": {}})]}, "parameters.anyOf is an object of 0 entries, it must be a list"),
        ({"tools": [tool(parameters={"oneOf": [{}, 5]})]}, "parameters.oneOf[1] is 5"),
        ({"tools": [tool(parameters={"required": "x"})]}, "parameters.required is 'x', it must be a list"),
        ({"tools": [tool(parameters={"enum": {}})]}, "parameters.enum is an object of 0 entries"),
        ({"tools": [tool(parameters={"$ref": 5})]}, "parameters.$ref is 5, it must be a string"),
        ({"tools": [tool(parameters={"$defs": {"k" * 500: 5}})]}, "kkk is 5, it must be a JSON schema"),
        ({"tools": [tool(parameters=nested(MAX_SCHEMA_DEPTH + 1))]}, f"the limit is {MAX_SCHEMA_DEPTH} schemas"),
        ({"tools": [tool(description="x" * MAX_TOOLS_BYTES)]}, f"bytes of JSON, the limit is {MAX_TOOLS_BYTES}"),
        ({"tools": [CLOCK] * 1025}, "more than 1024 entries"),
        ({"tool_choice": "auto"}, "tool_choice is auto without tools"),
        ({"tool_choice": "required"}, "tool_choice is required without tools"),
        ({"tool_choice": CHOOSE_CLOCK}, "tool_choice is named without tools"),
        ({"tools": [CLOCK], "tool_choice": "any"}, "tool_choice is 'any', it must be one of none, auto, required"),
        ({"tools": [CLOCK], "tool_choice": 5}, "tool_choice is 5, it must be one of"),
        ({"tools": [CLOCK], "tool_choice": {"type": "tool"}}, "tool_choice is an object of 1 entries"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function"}}, "tool_choice.function is null"),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "function", "function": {}}},
            "tool_choice.function.name is missing",
        ),
        (
            {"tools": [WEATHER], "tool_choice": CHOOSE_CLOCK},
            "tool_choice names the function 'clock', tools has 'weather'",
        ),
        (
            {"tools": [WEATHER], "tool_choice": allow("auto", CHOOSE_CLOCK)},
            "tool_choice names the function 'clock', tools has 'weather'",
        ),
        ({"tool_choice": allow("auto", CHOOSE_CLOCK)}, "tool_choice is auto without tools"),
        (
            {"tools": [CLOCK], "tool_choice": allow("none", CHOOSE_CLOCK)},
            "tool_choice.allowed_tools.mode is 'none', it must be auto or required",
        ),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "allowed_tools", "tools": [FLAT_CLOCK]}},
            "tool_choice.mode is null, it must be auto or required",
        ),
        (
            {"tools": [CLOCK], "tool_choice": allow("auto")},
            "tool_choice.allowed_tools.tools is empty, it must name at least one of tools",
        ),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "allowed_tools", "allowed_tools": 5}},
            "tool_choice.allowed_tools is 5, it must be a JSON object",
        ),
        (
            {"tools": [CLOCK], "tool_choice": allow("auto", {"type": "web_search"})},
            "tool_choice.allowed_tools.tools[0].type is 'web_search', it must be 'function'",
        ),
        ({"tools": [CLOCK], "tool_choice": allow("auto", 5)}, "tools[0] is 5, it must be a JSON object"),
        ({"tools": [CLOCK], "parallel_tool_calls": "no"}, "parallel_tool_calls is 'no', it must be true or false"),
    ],
)
def test_a_wrong_value_is_named_with_its_limit(values: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(**values)
    assert message in caught.value.message
    assert len(caught.value.message) < 400
    assert caught.value.param is not None and caught.value.param.startswith(tuple(values))


def test_a_schema_of_every_keyword_passes() -> None:
    schema = {
        "type": ["object", "null"],
        "properties": {"x": True, "y": {"$ref": "#/$defs/A"}, "z": {"prefixItems": [{}], "items": False}},
        "patternProperties": {"^a": {"not": {"type": "null"}}},
        "$defs": {"A": {"allOf": [{"const": 5}]}},
        "required": ["x"],
        "additionalProperties": False,
        "title": 5,
    }
    for parameters in ({**schema, "type": "object"}, nested(MAX_SCHEMA_DEPTH)):
        assert read(tools=[tool(parameters=parameters)]) is not None


CALL = "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"
TWO = CALL.replace("\n</function>", "\n<parameter=days>\n3\n</parameter>\n</function>")
TIME = "<tool_call>\n<function=clock>\n</function>\n</tool_call>"
FREE = "<tool_call>\n<function=clock>\n<parameter=zone>\nCET\n</parameter>\n</function>\n</tool_call>"


def constraint(*definitions: dict[str, Any], **values: Any) -> Constraint | None:
    """The constraint of a request."""
    tools = read(tools=[*definitions], **values)
    assert tools is not None
    return tool_constraint(tools, after_token_id=7)


def matches(found: Constraint | None, text: str) -> bool:
    """Whether a whole output meets the constraint, by the grammar that enforces it."""
    xgrammar = pytest.importorskip("xgrammar")
    assert found is not None and found.kind == "structural_tag" and found.after_token_id == 7
    end = 256
    vocabulary = xgrammar.TokenizerInfo([*map(chr, range(end)), "<end>"], stop_token_ids=[end])
    grammar = xgrammar.Grammar.from_structural_tag(found.text)
    matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(vocabulary).compile_grammar(grammar))
    return matcher.accept_string(text) and (matcher.is_terminated() or matcher.accept_token(end))


def test_auto_leaves_the_output_free_unless_a_tool_is_strict() -> None:
    assert constraint(WEATHER, CLOCK) is None
    assert constraint(WEATHER, tool("clock", strict=False)) is None


@pytest.mark.parametrize(
    ("text", "is_match"),
    [
        (CALL, True),
        ("\n\n" + CALL, True),
        (TWO, True),
        (TIME, True),
        (f"{CALL}\n{TIME}\n{TWO}", True),
        (CALL.replace("\nOslo\n", "Oslo"), True),
        (CALL.replace("Oslo", "a < b\n\n</x> é"), True),
        ("", False),
        ("I look. " + CALL, False),
        (CALL + " Done.", False),
        (CALL[:-1], False),
        (CALL.replace("weather", "sun"), False),
        (CALL.replace("city", "town"), False),
        (TWO.replace("3", "three"), False),
        (TWO.replace("<parameter=city>\nOslo\n</parameter>\n", ""), False),
        (CALL.replace("Oslo", "a </function> b"), False),
        (CALL.replace("Oslo", "a <parameter=x> b"), False),
    ],
)
def test_required_is_one_call_at_least_by_the_schemas_and_nothing_else(text: str, is_match: bool) -> None:
    assert (
        matches(
            constraint(WEATHER, tool("clock", parameters={"type": "object", "properties": {}}), tool_choice="required"),
            text,
        )
        is is_match
    )


def test_required_without_parallel_calls_is_one_call() -> None:
    found = constraint(WEATHER, CLOCK, tool_choice="required", parallel_tool_calls=False)
    assert matches(found, CALL)
    assert not matches(found, f"{CALL}\n{CALL}")


def test_a_named_function_is_called_once() -> None:
    found = constraint(WEATHER, CLOCK, tool_choice=CHOOSE_CLOCK)
    assert matches(found, TIME)
    assert not matches(found, FREE)
    assert not matches(found, CALL) and not matches(found, f"{TIME}\n{TIME}") and not matches(found, "")


def test_a_function_that_says_nothing_of_its_parameters_has_none_where_they_are_enforced() -> None:
    for values in ({"tool_choice": "required"}, {"tool_choice": CHOOSE_CLOCK}):
        assert matches(constraint(CLOCK, **values), TIME) and not matches(constraint(CLOCK, **values), FREE)
        assert matches(constraint(tool("clock", parameters={}), **values), FREE)
    found = constraint(tool("clock", strict=True))
    assert matches(found, TIME) and not matches(found, FREE)
    assert constraint(CLOCK) is None


def test_a_strict_tool_is_called_by_its_schema_if_at_all() -> None:
    found = constraint(tool(parameters=PARAMETERS, strict=True), CLOCK)
    for text in ("No call.", CALL, f"I look.\n\n{TWO}\n{FREE} Done.", FREE):
        assert matches(found, text)
    for text in (
        CALL.replace("city", "town"),
        TWO.replace("3", "three"),
        CALL.replace("weather", "sun"),
        "<tool_call>x",
    ):
        assert not matches(found, text)


@pytest.mark.parametrize("is_strict", [False, True])
def test_auto_among_some_tools_calls_no_other(is_strict: bool) -> None:
    weather = tool(parameters=PARAMETERS, strict=is_strict)
    found = constraint(weather, CLOCK, tool_choice=allow("auto", {"type": "function", "function": {"name": "weather"}}))
    for text in ("No call, a < b.", CALL, f"I look.\n\n{TWO}\n{CALL} Done."):
        assert matches(found, text)
    assert matches(found, CALL.replace("city", "town")) is not is_strict
    bare = "<function=clock>\n</function>"
    inner = CALL.replace("</function>", f"</function>\n{bare}")
    for text in (TIME, f"{CALL}\n{TIME}", bare, f"{CALL}{bare}", inner, "<tool_call>x"):
        assert not matches(found, text)


def test_required_among_some_tools_calls_one_of_them() -> None:
    choice = allow("required", CHOOSE_CLOCK, {"type": "function", "name": "other"})
    found = constraint(WEATHER, CLOCK, tool("other"), tool_choice=choice)
    assert matches(found, TIME) and matches(found, f"{TIME}\n{TIME.replace('clock', 'other')}")
    assert not matches(found, CALL) and not matches(found, "")


def test_the_constraint_is_plain_json() -> None:
    found = constraint(WEATHER, tool_choice="required")
    assert found is not None
    tag = json.loads(found.text)["format"]["elements"][1]["tags"][0]
    assert tag["content"]["json_schema"] == PARAMETERS


@pytest.mark.parametrize(
    ("limits", "fitting", "others"),
    [
        ({"minLength": 3, "maxLength": 9}, ["Oslo", "Rome\nII", "grün"], ["", "Os", "Oslo and Rome", "a<b"]),
        ({"maxLength": 2}, ["", "O", "Os"], ["Osl"]),
        ({"minLength": 1, "maxLength": 1}, ["O"], ["", "Os"]),
        ({"minLength": 2}, ["Os", "Oslo and Rome, " * 9 + "Oslo"], ["", "O"]),
        ({"maxLength": 0}, [""], ["O"]),
        ({"maxLength": 4, "type": ["string", "null"]}, ["Oslo", "null"], ["Oslos"]),
        ({"maxLength": 2, "type": ["string", "integer"]}, ["Os", "1234"], ["Osl"]),
        ({"maxLength": 2, "type": None}, ["Os"], ["123"]),
    ],
)
def test_lengths_of_strings_hold(limits: dict[str, Any], fitting: list[str], others: list[str]) -> None:
    rules = {name: rule for name, rule in {"type": "string", **limits}.items() if rule is not None}
    shape = {"type": "object", "properties": {"city": rules}, "required": ["city"]}
    found = constraint(tool(parameters=shape), tool_choice="required")
    assert all(matches(found, CALL.replace("Oslo", city)) for city in fitting)
    assert not any(matches(found, CALL.replace("Oslo", city)) for city in others)


@pytest.mark.parametrize("space", [" ", "\t", "\r", "\n", ""])
@pytest.mark.parametrize("rules", [{"minLength": 4, "maxLength": 4}, {"pattern": "^O[a-z]{3}$"}])
def test_a_space_that_the_grammar_allows_beside_a_value_is_no_part_of_it(rules: dict[str, Any], space: str) -> None:
    shape = {"type": "object", "properties": {"city": {"type": "string", **rules}}, "required": ["city"]}
    found = constraint(tool(parameters=shape), tool_choice="required")
    assert matches(found, CALL.replace("\nOslo\n", f"{space}Oslo{space}"))
    assert not matches(found, CALL.replace("\nOslo\n", f"{space}Oslo {space or ' '}"))
    writer = ArgumentWriter(shape)
    written = [writer.open("city"), writer.push(f"{space}Oslo{space}"), writer.close(), writer.finish()]
    assert json.loads("".join(written)) == {"city": "Oslo"}


@pytest.mark.parametrize("rule", ["pattern", "format"])
def test_a_strict_tool_is_told_what_cannot_be_enforced(rule: str) -> None:
    shape = {"properties": {"x": {"items": {"type": "string", rule: "date", "maxLength": 9}}}}
    with pytest.raises(InvalidRequest, match=rf"x\.items\.maxLength is 9, it must be left out beside {rule}") as caught:
        read(tools=[tool(parameters=shape, strict=True)])
    assert caught.value.param == "tools"
    assert read(tools=[tool(parameters=shape)]) is not None


def test_lengths_hold_inside_of_lists_and_objects() -> None:
    names = {"type": "array", "items": {"type": "string", "maxLength": 3}}
    shape = {"type": "object", "properties": {"city": {"anyOf": [names, {"type": "integer"}]}}, "required": ["city"]}
    found = constraint(tool(parameters=shape), tool_choice="required")
    for value, is_match in (('["abc", ""]', True), ("7", True), ('["abcd"]', False), ('["a"b"]', False)):
        assert matches(found, CALL.replace("Oslo", value)) is is_match


LISTED = {"enum": ["Oslo", " Rome", "Rome", "Bonn ", "\nKiel"]}


@pytest.mark.parametrize(
    "rules",
    [LISTED, {"$ref": "#/$defs/c"}, {"anyOf": [LISTED, {"type": "null"}]}, {"allOf": [{"$ref": "#/$defs/c"}]}],
    ids=lambda rules: next(iter(rules)),
)
@pytest.mark.parametrize("strict", [False, True])
def test_a_value_that_is_listed_is_read_as_it_is_listed(rules: dict[str, Any], strict: bool) -> None:
    parameters = {"type": "object", "properties": {"city": rules}, "required": ["city"], "$defs": {"c": LISTED}}
    tools = read(tools=[tool(parameters=parameters, strict=strict)], tool_choice="required")
    assert tools is not None
    found = tool_constraint(tools, after_token_id=7)
    for before in ("", " ", "\t", "\r", "\n"):
        for city in LISTED["enum"]:
            for after in ("", " ", "\t", "\r", "\n"):
                text = before + city + after
                assert matches(found, CALL.replace("\nOslo\n", text))
                writer = ArgumentWriter(tools.schemas["weather"])
                written = [writer.open("city"), *map(writer.push, text), writer.close(), writer.finish()]
                assert json.loads("".join(written))["city"] in LISTED["enum"]


@pytest.mark.parametrize(
    ("rules", "fitting", "others"),
    [
        ({"allOf": [{"type": "integer"}, {"minimum": 3, "maximum": 5}]}, ["3", "5"], ["2", "6", "x"]),
        ({"allOf": [{"type": "string"}, {"enum": ["z"]}]}, ["z"], ["y"]),
        ({"type": "string", "anyOf": [{"enum": ["z", 3]}, {"const": "x"}]}, ["z", "x"], ["3", "y"]),
        ({"$ref": "#/$defs/n", "minimum": 5}, ["5"], ["4"]),
        ({"enum": ["z", 3, 7], "minimum": 5}, ["z", "7"], ["3"]),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_all_that_is_said_of_a_value_is_enforced(
    rules: dict[str, Any], fitting: list[str], others: list[str], strict: bool
) -> None:
    parameters = {"properties": {"city": rules}, "required": ["city"], "$defs": {"n": {"type": "integer"}}}
    found = constraint(tool(parameters=parameters, strict=strict), tool_choice="required")
    assert all(matches(found, CALL.replace("Oslo", value)) for value in fitting)
    assert not any(matches(found, CALL.replace("Oslo", value)) for value in others)


def test_alternatives_of_the_parameters_are_enforced() -> None:
    either = [{"required": ["city"]}, {"required": ["days"]}]
    found = constraint(tool(parameters={"properties": PARAMETERS["properties"], "anyOf": either}, strict=True))
    assert matches(found, CALL) and matches(found, TWO)
    assert not matches(found, TIME.replace("clock", "weather"))
