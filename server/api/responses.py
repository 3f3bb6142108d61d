"""OpenAI's newer API: POST /v1/responses, and what becomes of a response afterwards."""

from functools import partial
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response

from server.api.chat_messages import MAX_MESSAGES, read_text
from server.api.conversations import CONVERSATION_FIELDS, Conversation, read_flat_tools, read_form, read_job
from server.api.fields import Fields, known_fields, shown, shown_json, split_list
from server.api.foreign_schemas import RESPONSE, RESPONSE_ITEMS, RESPONSE_REQUEST
from server.api.input_items import MAX_ITEMS, ORDERS, list_items, read_page
from server.api.openapi import GENERATION_ERRORS, operation, path_parameter, query_parameter
from server.api.requests import check_model, generate, refuse_unserved
from server.api.response_answer import ResponseAnswer, ResponseJob
from server.api.response_items import REFERENCE, read_items
from server.api.response_store import ResponseStore, Stored
from server.api.sampling import read_num_logprobs
from server.api.services import Services
from server.api.thinking import EFFORTS
from server.api.tools import (
    ALLOWED,
    AUTO,
    NAMED,
    NONE,
    REQUIRED,
    Choice,
    Tool,
    Tools,
    mistake,
    read_allowed,
    read_function,
)
from server.errors import InvalidRequest, NotFound

_UNSERVED = ("background", "conversation", "prompt")
# Texts of which nothing is made here.
_REPEATED = ("prompt_cache_key", "safety_identifier")
_REQUEST = known_fields(
    *CONVERSATION_FIELDS,
    *("input", "instructions", "max_output_tokens", "text", "reasoning", "metadata", "store", "previous_response_id"),
    *("parallel_tool_calls", "include", "user", "truncation", "max_tool_calls"),
    *_REPEATED,
    *_UNSERVED,
)
_TEXT = known_fields("format", "verbosity")
# What is too long is refused with either; the answer says so.
_TRUNCATIONS = ("auto", "disabled")
_VERBOSITIES = ("low", "medium", "high")
_REFERENCE = known_fields("type", "id")
_REASONING = known_fields("effort")
_TOOL = known_fields("type", "name", "description", "parameters", "strict")
_CHOICE = known_fields("type", "name")
_SCORES = "message.output_text.logprobs"
_MAX_INCLUDED = 64
_PAGE = [
    query_parameter("limit", {"type": "integer", "minimum": 1, "maximum": MAX_ITEMS}),
    query_parameter("order", {"enum": [*ORDERS]}),
    query_parameter("after", {"type": "string"}),
]


def add_response_routes(app: FastAPI, services: Services) -> None:
    """POST /v1/responses, and what can be done with one response."""
    store, running = ResponseStore(), dict[str, ResponseAnswer]()
    _add_stored_routes(app, services, store, running)

    @app.post(
        "/v1/responses", **operation(request=RESPONSE_REQUEST, answer=RESPONSE, streams=True, errors=GENERATION_ERRORS)
    )
    async def create_response(request: Request) -> Response:
        """A response, whole or streamed."""
        return await generate(
            request,
            services,
            lambda body: read_response_job(Fields(_REQUEST, body), services, store),
            lambda job, generation: ResponseAnswer(services, job, generation, store, running),
            closing=b"",
            adds_more=True,  # the conversation before it
        )


def _add_stored_routes(
    app: FastAPI, services: Services, store: ResponseStore, running: dict[str, ResponseAnswer]
) -> None:
    one = [path_parameter("response_id")]
    readable = [InvalidRequest, NotFound]

    @app.get(
        "/v1/responses/{response_id}",
        **operation(answer=RESPONSE, errors=readable, parameters=[*one, query_parameter("stream", {"const": False})]),
    )
    async def show_response(request: Request) -> Response:
        """A response that is being generated or was stored."""
        _refuse_stream(request)
        response_id = request.path_params["response_id"]
        if response_id in running:
            return _json(running[response_id].describe("in_progress"))
        return Response(store.get(response_id).body, media_type="application/json")

    @app.get(
        "/v1/responses/{response_id}/input_items",
        **operation(answer=RESPONSE_ITEMS, errors=readable, parameters=[*one, *_PAGE]),
    )
    async def list_input_items(request: Request) -> Response:
        """What a response was made of: the items of the conversation before it."""
        response_id, page = request.path_params["response_id"], read_page(request.query_params)
        source = running[response_id] if response_id in running else store.get(response_id)
        return await services.do_apart(lambda source: _json(list_items(response_id, _items_of(source), page)), source)

    @app.delete("/v1/responses/{response_id}", **operation(errors=[NotFound], parameters=one))
    async def delete_response(request: Request) -> dict[str, Any]:
        """Forget a response that was stored."""
        response_id = request.path_params["response_id"]
        store.delete(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    @app.post("/v1/responses/{response_id}/cancel", **operation(answer=RESPONSE, errors=[NotFound], parameters=one))
    async def cancel_response(request: Request) -> Response:
        """End a response that is being generated; one that was stored stays as it is."""
        response_id = request.path_params["response_id"]
        if response_id not in running:
            return Response(store.get(response_id).body, media_type="application/json")
        running[response_id].cancel()
        return _json(running[response_id].describe("cancelled"))


def _items_of(source: ResponseAnswer | Stored) -> list[bytes]:
    """The items that a response was made of."""
    if isinstance(source, ResponseAnswer):
        return source.items
    return [bytes(item) for item in msgspec.json.decode(source.input_items, type=list[msgspec.Raw])]


def _refuse_stream(request: Request) -> None:
    stream = request.query_params.get("stream", "false")
    if stream.lower() not in ("false", "0"):
        rule = "it must be false: a response is streamed while it is created, later it is told whole"
        raise InvalidRequest(f"stream is {shown(stream)}, {rule}", "stream")


def read_response_job(fields: Fields, services: Services, store: ResponseStore) -> ResponseJob:
    """What a request asks for. Raises InvalidRequest, NotFound for an earlier response or item that is not there."""
    check_model(fields, services)
    refuse_unserved(fields, _UNSERVED)
    settings, items = _read_settings(fields), _read_input(fields, store)
    before = [] if settings["previous_response_id"] is None else _read_earlier(settings["previous_response_id"], store)
    return read_job(
        fields,
        services,
        lambda fields: _read_conversation(fields, settings, before, items),
        "max_output_tokens",
        partial(ResponseJob, settings=settings, items=[*before, *items], is_stored=settings["store"]),
        read_form(Fields(_TEXT, fields.raw("text") or b"{}", "text")),
        logprobs=_read_scores(fields, services),
    )


def _read_settings(fields: Fields) -> dict[str, Any]:
    """The fields that a response repeats."""
    fields.mapping("metadata")
    truncation = fields.text("truncation", "disabled")
    if truncation not in _TRUNCATIONS:
        raise InvalidRequest(f"truncation is {shown(truncation)}, it must be auto or disabled", "truncation")
    return {
        **{name: fields.text(name, "") or None for name in _REPEATED},
        "instructions": read_text("instructions", fields.raw("instructions")) if fields.has("instructions") else None,
        "max_tool_calls": fields.integer("max_tool_calls", None),  # of tools that the server runs, which has none
        "metadata": msgspec.Raw(fields.raw("metadata") or b"{}"),
        "parallel_tool_calls": fields.boolean("parallel_tool_calls", True),
        "previous_response_id": fields.text("previous_response_id", "") or None,
        "reasoning": {"effort": _read_effort(fields), "summary": None},
        "store": fields.boolean("store", True),
        "text": _read_text_settings(fields),
        "tool_choice": msgspec.Raw(fields.raw("tool_choice") or b'"auto"'),
        "tools": msgspec.Raw(fields.raw("tools") or b"[]"),
        "user": fields.text("user", "") or None,
    }


def _read_text_settings(fields: Fields) -> dict[str, Any]:
    text = Fields(_TEXT, fields.raw("text") or b"{}", "text")
    form = {"format": msgspec.Raw(text.raw("format") or b'{"type":"text"}')}
    if not text.has("verbosity"):
        return form
    verbosity = text.text("verbosity", "")
    if verbosity not in _VERBOSITIES:
        rule = f"it must be one of {', '.join(_VERBOSITIES)}"
        raise InvalidRequest(f"text.verbosity is {shown(verbosity)}, {rule}", "text.verbosity")
    return {**form, "verbosity": verbosity}


def _read_effort(fields: Fields) -> str | None:
    reasoning = Fields(_REASONING, fields.raw("reasoning") or b"{}", "reasoning")
    effort = reasoning.text("effort", "") if reasoning.has("effort") else None
    if effort is not None and effort not in EFFORTS:
        rule = f"it must be one of {', '.join(EFFORTS)}"
        raise InvalidRequest(f"reasoning.effort is {shown(effort)}, {rule}", "reasoning.effort")
    return effort


def _read_input(fields: Fields, store: ResponseStore) -> list[bytes]:
    """The items of the request: a text is a user's message, and what a reference stands for is in its place."""
    raw = fields.raw("input")
    if raw[:1] == b'"':
        return [msgspec.json.encode({"role": "user", "content": read_text("input", raw)})]
    items = split_list("input", raw, MAX_MESSAGES) if raw[:1] == b"[" else []
    if not items:
        raise InvalidRequest(f"input is {shown_json(raw)}, it must be a text or a list of at least one item", "input")
    return [_resolve(item, f"input[{i}]", store) for i, item in enumerate(items)]


def _resolve(item: bytes, where: str, store: ResponseStore) -> bytes:
    reference = Fields(_REFERENCE, item, where)
    if reference.value("type") != REFERENCE:
        return item
    name = reference.name("id")
    return store.get_item(read_text(name, reference.raw("id")), name)


def _read_earlier(response_id: str, store: ResponseStore) -> list[bytes]:
    """The items of the conversation that a stored response ended."""
    name = "previous_response_id"
    stored = store.get(response_id, name)
    return [*split_list(name, stored.input_items, MAX_MESSAGES), *stored.own_items.values()]


def _read_conversation(
    fields: Fields, settings: dict[str, Any], before: list[bytes], items: list[bytes]
) -> Conversation:
    effort, instructions = settings["reasoning"]["effort"], settings["instructions"]
    placed = [(item, "previous_response_id") for item in before]
    placed += [(item, f"input[{i}]") for i, item in enumerate(items)]
    if instructions is not None:
        placed = [(msgspec.json.encode({"role": "system", "content": instructions}), "instructions"), *placed]
    return Conversation(read_items(placed), "input", _read_tools(fields), None if effort is None else effort != "none")


def _read_tools(fields: Fields) -> Tools | None:
    return read_flat_tools(fields, _read_choice(fields), fields.boolean("parallel_tool_calls", True), _read_tool)


def _read_choice(fields: Fields) -> Choice:
    """`tool_choice`; auto when absent."""
    raw = fields.raw("tool_choice")
    if raw[:1] == b"{":
        choice = Fields(_CHOICE, raw, "tool_choice")
        if choice.value("type") == ALLOWED:
            return read_allowed(fields)
        if choice.value("type") == "function":
            return Choice(NAMED, (choice.text("name", ""),))
    elif (value := fields.value("tool_choice") if raw else AUTO) in (NONE, AUTO, REQUIRED):
        return Choice(value)
    rule = "one of none, auto, required, or an object that names a function"
    raise InvalidRequest(f"tool_choice is {shown_json(raw)}, it must be {rule}", "tool_choice")


def _read_tool(entry: bytes, where: str) -> Tool:
    fields = Fields(_TOOL, entry, where)
    if fields.value("type") != "function":
        raise mistake(fields.name("type"), fields.value("type"), "'function'")
    return read_function(fields, "parameters")


def _read_scores(fields: Fields, services: Services) -> int | None:
    """How many alternatives are told for each token of the text; None tells nothing of the tokens."""
    num_top = read_num_logprobs(fields, "top_logprobs", services.limits)
    return num_top if num_top is not None or _SCORES not in fields.items("include", _MAX_INCLUDED) else 0


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
