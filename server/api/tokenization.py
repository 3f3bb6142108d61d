"""The tokenizer over HTTP: POST /tokenize and /detokenize, GET /tokenizer_info. Prompts may be of any length here."""

from typing import Any

from fastapi import FastAPI, Request, Response

from server.api.chat_messages import read_text
from server.api.fields import Fields, known_fields
from server.api.logprobs import completion_token
from server.api.openapi import READ_ERRORS, Schema, nullable, operation
from server.api.prompts import PROMPT_FIELDS, PromptReader
from server.api.requests import check_model, reply
from server.api.schemas import CHAT_REQUEST
from server.api.services import Services
from server.api.thinking import THINKING_FIELDS
from server.api.tools import TOOL_FIELDS, read_tools
from server.api.truncation import TRUNCATION_FIELDS, read_truncation

_TOKENIZE = known_fields("model", "return_token_strs", *PROMPT_FIELDS, *THINKING_FIELDS, *TOOL_FIELDS)
_DETOKENIZE = known_fields("model", "tokens")
_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_CHAT_FIELDS = (
    *("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"),
    *TRUNCATION_FIELDS,
)
_TOKENIZE_REQUEST: Schema = {
    "type": "object",
    "properties": {
        "model": nullable("string"),
        "prompt": nullable("string"),
        "add_special_tokens": nullable("boolean"),
        "return_token_strs": nullable("boolean"),
        **{name: CHAT_REQUEST["properties"][name] for name in _CHAT_FIELDS},
        "messages": {"oneOf": [CHAT_REQUEST["properties"]["messages"], {"type": "null"}]},
    },
}
_TOKENS: Schema = {
    "type": "object",
    "required": ["count", "max_model_len", "tokens", "token_strs"],
    "properties": {
        "count": {"type": "integer"},
        "max_model_len": {"type": "integer"},
        "tokens": _IDS,
        "token_strs": nullable("array", items={"type": "string"}),
    },
}
_DETOKENIZE_REQUEST: Schema = {
    "type": "object",
    "required": ["tokens"],
    "properties": {"model": nullable("string"), "tokens": _IDS},
}
_TEXT: Schema = {"type": "object", "required": ["prompt"], "properties": {"prompt": {"type": "string"}}}


def add_tokenizer_routes(app: FastAPI, services: Services) -> None:
    """The three routes; the first two also under /v1."""
    prompts = services.prompts.without_limit()

    @app.post("/v1/tokenize", **operation(request=_TOKENIZE_REQUEST, answer=_TOKENS, errors=READ_ERRORS))
    @app.post("/tokenize", **operation(request=_TOKENIZE_REQUEST, answer=_TOKENS, errors=READ_ERRORS))
    async def tokenize(request: Request) -> Response:
        """Token ids of a text or of a conversation."""
        return await reply(request, services, lambda body: _tokenize(Fields(_TOKENIZE, body), services, prompts))

    @app.post("/v1/detokenize", **operation(request=_DETOKENIZE_REQUEST, answer=_TEXT, errors=READ_ERRORS))
    @app.post("/detokenize", **operation(request=_DETOKENIZE_REQUEST, answer=_TEXT, errors=READ_ERRORS))
    async def detokenize(request: Request) -> Response:
        """The text of token ids, special tokens written out."""
        return await reply(request, services, lambda body: _detokenize(Fields(_DETOKENIZE, body), services))

    @app.get("/tokenizer_info", **operation())
    async def tokenizer_info() -> dict[str, Any]:
        """What a client needs to prepare prompts by itself: special tokens and the chat template."""
        return {**services.tokenizer.description, "model_max_length": services.limits.max_model_len}


def _tokenize(fields: Fields, services: Services, prompts: PromptReader) -> dict[str, Any]:
    check_model(fields, services)
    if fields.has("messages"):
        tools = read_tools(fields)
        token_ids = prompts.read_chat(fields, None if tools is None else tools.definitions).token_ids
    else:
        text = read_text("prompt", fields.raw("prompt"))
        truncation = read_truncation(fields, services.limits.max_model_len)
        token_ids = services.tokenizer.encode(text, fields.boolean("add_special_tokens", True))
        token_ids = token_ids if truncation is None else truncation.cut(token_ids)
    shows_texts = fields.boolean("return_token_strs", False)
    return {
        "count": len(token_ids),
        "max_model_len": services.limits.max_model_len,
        "tokens": token_ids,
        "token_strs": [completion_token(services.tokenizer, i) for i in token_ids] if shows_texts else None,
    }


def _detokenize(fields: Fields, services: Services) -> dict[str, str]:
    check_model(fields, services)
    token_ids = services.prompts.read_ids("tokens", fields.raw("tokens"))
    return {"prompt": services.tokenizer.decode(token_ids, skip_special_tokens=False)}
