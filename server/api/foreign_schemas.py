"""JSON schemas of what the endpoints of other APIs take and give, like `schemas.py` for the first two of OpenAI's."""

from typing import Any

from server.api.conversations import CONVERSATION_FIELDS
from server.api.openapi import Schema, nullable
from server.api.schemas import CHAT_REQUEST
from server.api.terms import TERM_FIELDS
from server.messages import LOGPROBS_MODES

_CHAT: dict[str, Schema] = CHAT_REQUEST["properties"]
_OBJECTS: Schema = {"type": "array", "items": {"type": "object"}}
_TEXT: Schema = {"type": "string"}
_TEXT_OR_PARTS: Schema = {"oneOf": [_TEXT, _OBJECTS]}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_IDS: Schema = {"type": "array", "items": _COUNT}


def _object(required: tuple[str, ...], **properties: Schema) -> Schema:
    return {"type": "object", "required": list(required), "properties": properties}


def _without(*names: str) -> dict[str, Schema]:
    """The fields that conversations of all APIs have, but for some that are different."""
    return {name: _CHAT[name] for name in CONVERSATION_FIELDS if name in _CHAT and name not in names}


def _one_or_list(of: Schema) -> Schema:
    return {"oneOf": [of, {"type": "array", "items": of, "minItems": 1}]}


RESPONSE_REQUEST = _object(
    ("input",),
    **_without("top_logprobs"),
    input=_TEXT_OR_PARTS,
    instructions=nullable("string"),
    max_output_tokens=nullable("integer", minimum=1),
    text=nullable("object"),
    reasoning=nullable("object"),
    metadata=nullable("object"),
    store=nullable("boolean"),
    previous_response_id=nullable("string"),
    parallel_tool_calls=nullable("boolean"),
    include=nullable("array", items=_TEXT),
    truncation={"enum": ["auto", "disabled", None]},
    max_tool_calls=nullable("integer"),
    prompt_cache_key=nullable("string"),
    safety_identifier=nullable("string"),
    top_logprobs=nullable("integer", minimum=-1),
)
RESPONSE = _object(
    ("id", "object", "created_at", "model", "status", "output", "usage"),
    id=_TEXT,
    object={"const": "response"},
    created_at=_COUNT,
    model=_TEXT,
    status={"enum": ["completed", "incomplete", "in_progress", "cancelled"]},
    output=_OBJECTS,
    usage=nullable(
        "object",
        required=["input_tokens", "input_tokens_details", "output_tokens", "output_tokens_details", "total_tokens"],
        properties={
            "input_tokens": _COUNT,
            "input_tokens_details": _object(
                ("cached_tokens", "cache_write_tokens"), cached_tokens=_COUNT, cache_write_tokens=_COUNT
            ),
            "output_tokens": _COUNT,
            "output_tokens_details": _object(("reasoning_tokens",), reasoning_tokens=_COUNT),
            "total_tokens": _COUNT,
        },
    ),
)
RESPONSE_ITEMS = _object(
    ("object", "data", "first_id", "last_id", "has_more"),
    object={"const": "list"},
    data={"type": "array", "items": _object(("id", "type", "status"), id=_TEXT, type=_TEXT)},
    first_id=nullable("string"),
    last_id=nullable("string"),
    has_more={"type": "boolean"},
)
ANTHROPIC_REQUEST = _object(
    ("messages", "max_tokens"),
    **_without("max_tokens", "tool_choice"),
    messages={
        "type": "array",
        "minItems": 1,
        "items": _object(("role", "content"), role={"enum": ["user", "assistant", "system"]}, content=_TEXT_OR_PARTS),
    },
    max_tokens={"type": "integer", "minimum": 1},
    system={"oneOf": [{"type": ["string", "null"]}, _OBJECTS]},
    stop_sequences=nullable("array", items=_TEXT, maxItems=64),
    thinking=nullable("object"),
    tool_choice=nullable("object"),
)
ANTHROPIC_MESSAGE = _object(
    ("id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage"),
    id=_TEXT,
    type={"const": "message"},
    role={"const": "assistant"},
    model=_TEXT,
    content=_OBJECTS,
    usage=_object(("input_tokens", "output_tokens"), input_tokens=_COUNT, output_tokens=_COUNT),
)
ANTHROPIC_ERROR = _object(
    ("type", "error"), type={"const": "error"}, error=_object(("type", "message"), type=_TEXT, message=_TEXT)
)
TOKEN_COUNT = _object(("input_tokens",), input_tokens=_COUNT)

_LOGPROBS_MODE: Schema = {"enum": [*LOGPROBS_MODES, None]}
_OUTPUT = _object(
    ("text", "output_ids", "meta_info"), text=nullable("string"), output_ids=_IDS, meta_info={"type": "object"}
)
GENERATE_REQUEST: dict[str, Any] = {
    **_object(
        (),
        text=_one_or_list(_TEXT),
        input_ids={"oneOf": [_IDS, {"type": "array", "items": _IDS}]},
        sampling_params=nullable("object"),
        return_logprob=nullable("boolean"),
        logprob_start_len=nullable("integer", minimum=-1),
        top_logprobs_num=nullable("integer", minimum=-1),
        return_text_in_logprobs=nullable("boolean"),
        logprobs_mode=_LOGPROBS_MODE,
        stream=nullable("boolean"),
        rid={"oneOf": [nullable("string"), {"type": "array", "items": _TEXT, "minItems": 1}]},
        extra_key=nullable("string", minLength=1, maxLength=256),
        **{name: _CHAT[name] for name in ("model", *TERM_FIELDS)},
    ),
    "oneOf": [{"required": ["text"]}, {"required": ["input_ids"]}],
}
GENERATE_ANSWER: Schema = {"oneOf": [_OUTPUT, {"type": "array", "items": _OUTPUT}]}
TOKENS_REQUEST = _object(
    ("token_ids",),
    token_ids=_IDS,
    sampling_params=nullable("object"),
    logprobs_mode=_LOGPROBS_MODE,
    **{name: _CHAT[name] for name in ("model", "stream", "stream_options", "request_id", *TERM_FIELDS)},
)
TOKENS_ANSWER = _object(
    ("id", "choices", "usage"),
    id=_TEXT,
    choices={"type": "array", "items": _object(("index", "token_ids", "finish_reason"), token_ids=_IDS)},
)
