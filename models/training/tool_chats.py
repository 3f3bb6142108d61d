"""Chats with tools that the demo model reads in training: which tool to call, with what, and what its answer says.

Knows text only. Tools are defined anew in every chat, from a pool of names, parameter names and descriptions, so that
the model copies a call's names from the definitions it is given instead of knowing them by heart.
"""

import json
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CITIES = (
    "Paris", "London", "Tokyo", "Berlin", "Rome", "Madrid", "Boston", "New York", "San Francisco", "Chicago", "Oslo",
    "Vienna", "Beijing", "Shanghai", "Sydney", "Dublin", "Seoul", "Lisbon", "Athens", "Cairo", "Delhi", "Toronto",
    "Seattle", "Prague", "Munich", "Zurich", "Moscow", "Lima", "Dallas", "Hamburg", "Milan", "Warsaw", "Kyoto",
    "San Francisco, CA", "Boston, MA", "Paris, France", "London, UK", "Tokyo, Japan", "Los Angeles", "Singapore",
)  # fmt: skip
_TOPICS = (
    "red apples", "old books", "fast trains", "green tea", "speculative decoding", "small models", "the moon", "cats",
    "how to bake bread", "the history of Rome", "good music", "cheap flights", "football", "winter coats", "robots",
)  # fmt: skip
_PEOPLE = ("Anna", "Tom", "Mia", "Ben", "Sara", "Max", "Lena", "Paul", "Zoe", "Omar")
_NOTES = ("Hello", "See you soon", "Call me back", "I am late", "Good luck", "Dinner is ready", "Thank you")
_WEATHER = ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "clear")
_UNITS = ("celsius", "fahrenheit")


@dataclass(frozen=True)
class Tool:
    """One kind of tool.

    Attributes:
        names: what it may be called.
        descriptions: what it may be said to do.
        parameters: per parameter the names it may have, and its JSON type.
        questions: what a user asks, a placeholder `{0}`, `{1}` per parameter.
    """

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[tuple[tuple[str, ...], str], ...]
    questions: tuple[str, ...]


WEATHER = Tool(
    ("get_weather", "get_current_weather", "weather", "lookup_weather", "fetch_weather", "weather_report"),
    ("Get the weather", "Get the current weather in a given location", "Get the weather in a city", "Weather by city"),
    ((("city", "location", "place", "town"), "string"),),
    (
        "What is the weather in {0}?", "What's the weather in {0}?", "What is the weather like in {0}?",
        "What's the weather like in {0} today?", "How is the weather in {0}?", "Weather in {0}?",
        "Tell me the weather in {0}.", "What is the weather in {0} right now?", "Get the weather for {0}.",
        "Is it raining in {0}?",
    ),
)  # fmt: skip
TIME = Tool(
    ("get_time", "get_current_time", "clock", "local_time", "time_in_city"),
    ("Get the time", "Get the current time in a given location", "Local time of a city"),
    ((("city", "location", "timezone", "place"), "string"),),
    ("What time is it in {0}?", "What is the time in {0}?", "Tell me the time in {0}.", "Current time in {0}?"),
)
CALCULATOR = Tool(
    ("calculator", "calculate", "compute", "evaluate", "eval_expression"),
    ("Evaluate an arithmetic expression", "Calculate the result of an expression", "A calculator"),
    ((("expression", "formula", "input", "expr"), "string"),),
    ("What is {0}?", "Calculate {0}.", "Compute {0}.", "How much is {0}?", "Use the calculator for {0}.", "{0} = ?"),
)
ADD = Tool(
    ("add", "add_numbers", "sum_numbers", "plus"),
    ("Add two numbers", "Add two integers", "Give the sum of two numbers"),
    ((("a", "x", "first", "left"), "integer"), (("b", "y", "second", "right"), "integer")),
    ("Add {0} and {1}.", "What is the sum of {0} and {1}?", "Sum {0} and {1}.", "Please add {0} and {1}."),
)
MULTIPLY = Tool(
    ("multiply", "multiply_numbers", "product", "times"),
    ("Multiply two numbers", "Multiply two integers", "Give the product of two numbers"),
    ((("a", "x", "first", "left"), "integer"), (("b", "y", "second", "right"), "integer")),
    ("Multiply {0} and {1}.", "What is the product of {0} and {1}?", "Multiply {0} by {1}."),
)
SEARCH = Tool(
    ("search", "web_search", "search_web", "find_documents", "lookup"),
    ("Search the web", "Search for documents", "Find pages about a topic"),
    ((("query", "q", "topic", "text"), "string"),),
    ("Search for {0}.", "Find something about {0}.", "Look up {0}.", "Search the web for {0}."),
)
MESSAGE = Tool(
    ("send_message", "send_email", "notify", "message_user"),
    ("Send a message", "Send a message to a person", "Notify somebody"),
    ((("to", "recipient", "name", "user"), "string"), (("text", "body", "message", "content"), "string")),
    ("Send {0} the message: {1}", "Tell {0}: {1}", "Write to {0}: {1}", "Send this to {0}: {1}"),
)
TOOLS = (WEATHER, TIME, CALCULATOR, ADD, MULTIPLY, SEARCH, MESSAGE)
_FREQUENCIES = (6, 2, 4, 2, 2, 3, 2)


@dataclass(frozen=True)
class Definition:
    """A tool as one chat has it: its kind, its names there, and the JSON object a client sends."""

    tool: Tool
    name: str
    parameters: tuple[str, ...]
    schema: dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One call: the function's name and its arguments as values."""

    name: str
    arguments: dict[str, Any]

    @property
    def markup(self) -> str:
        """The call as the model writes it."""
        lines = [f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in self.arguments.items()]
        return f"<tool_call>\n<function={self.name}>\n{''.join(lines)}</function>\n</tool_call>"

    @property
    def message(self) -> dict[str, Any]:
        """The call as an entry of a message's `tool_calls`."""
        return {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class ToolChat:
    """A question, the tools it may use, the calls it needs and what the tools say.

    Attributes:
        question: the user's turn.
        definitions: the tools, as a request's `tools`.
        calls: what the model has to call, in order.
        results: what each call gives, as text.
    """

    question: str
    definitions: list[dict[str, Any]]
    calls: tuple[Call, ...]
    results: tuple[str, ...]

    @property
    def markup(self) -> str:
        """The calls as the model writes them."""
        return "\n".join(call.markup for call in self.calls)

    @property
    def answer(self) -> str:
        """What the model says once it has the results."""
        return "\n".join(f"The result is: {result}" for result in self.results)


def draw_tool_chat(rng: random.Random) -> ToolChat:
    """Draw a chat that needs one call, sometimes two of the same tool; up to two other tools are there as well."""
    definitions = draw_definitions(rng)
    chosen = definitions[0]
    num_calls = 2 if chosen.tool in (WEATHER, TIME) and rng.random() < 0.2 else 1
    values = [_draw_values(chosen.tool, rng) for _ in range(num_calls)]
    texts = [" and ".join(dict.fromkeys(map(str, column))) for column in zip(*values, strict=True)]
    question = rng.choice(chosen.tool.questions).format(*texts)
    distinct = dict.fromkeys(values)
    calls = tuple(Call(chosen.name, dict(zip(chosen.parameters, row, strict=True))) for row in distinct)
    rng.shuffle(definitions)
    results = tuple(_draw_result(chosen.tool, row, rng) for row in distinct)
    return ToolChat(question, [definition.schema for definition in definitions], calls, results)


def draw_definitions(rng: random.Random) -> list[Definition]:
    """Draw one to three tools of different kinds."""
    first = rng.choices(TOOLS, _FREQUENCIES)[0]
    others = [tool for tool in TOOLS if tool is not first]
    kinds = [first, *rng.sample(others, rng.choice((0, 0, 1, 1, 2)))]
    return [_define(tool, rng) for tool in kinds]


def _define(tool: Tool, rng: random.Random) -> Definition:
    """Draw names for a tool and write its JSON object, with or without what is optional in it."""
    name = rng.choice(tool.names) if rng.random() < 0.85 else _draw_name(rng)
    parameters = tuple(rng.choice(names) for names, _ in tool.parameters)
    properties: dict[str, Any] = {
        key: {"type": kind} for key, (_, kind) in zip(parameters, tool.parameters, strict=True)
    }
    if rng.random() < 0.3:
        for key in parameters:
            properties[key]["description"] = f"The {key}"
    if tool is WEATHER and rng.random() < 0.3:
        properties["unit"] = {"type": "string", "enum": list(_UNITS)}
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if rng.random() < 0.8:
        schema["required"] = list(parameters)
    function: dict[str, Any] = {"name": name}
    if rng.random() < 0.85:
        function["description"] = rng.choice(tool.descriptions)
    return Definition(tool, name, parameters, {"type": "function", "function": {**function, "parameters": schema}})


def _draw_name(rng: random.Random) -> str:
    """Draw a name that nobody could know by heart."""
    letters = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 6))) for _ in range(rng.randint(1, 2))]
    return "_".join(letters)


def _draw_values(tool: Tool, rng: random.Random) -> tuple[Any, ...]:
    """Draw the arguments of one call."""
    if tool in (WEATHER, TIME):
        return (rng.choice(CITIES),)
    if tool is CALCULATOR:
        return (_draw_expression(rng),)
    if tool is SEARCH:
        return (rng.choice(_TOPICS),)
    if tool is MESSAGE:
        return (rng.choice(_PEOPLE), rng.choice(_NOTES))
    return tuple(rng.randint(1, 999) for _ in tool.parameters)


def _draw_expression(rng: random.Random) -> str:
    """Draw an expression of two or three numbers."""
    space = rng.choice(("", " "))
    numbers = [str(rng.randint(1, 999)) for _ in range(rng.choice((2, 2, 3)))]
    parts = numbers[:1]
    for number in numbers[1:]:
        parts += [rng.choice("+-*/"), number]
    return space.join(parts)


def _draw_result(tool: Tool, values: Sequence[Any], rng: random.Random) -> str:
    """Draw what a tool gives: plain text or a small JSON object."""
    if tool is WEATHER:
        sky, degrees = rng.choice(_WEATHER), rng.randint(-9, 39)
        return rng.choice((f"{sky}, {degrees} degrees", json.dumps({"weather": sky, "temperature": degrees}), sky))
    if tool is TIME:
        return f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    if tool is ADD:
        return str(values[0] + values[1])
    if tool is MULTIPLY:
        return str(values[0] * values[1])
    if tool is CALCULATOR:
        return str(rng.randint(1, 9999))
    return rng.choice(("done", "ok", f"{rng.randint(1, 50)} found", json.dumps({"status": "ok"})))
