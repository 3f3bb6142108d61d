"""JSON schemas of what the generating endpoints take and give, for /openapi.json and who reads it.

Every field may be null, which is the same as leaving it out; fields that are not here are ignored. The readers of the
endpoints know more: what goes together, and sizes of the model.
"""

from server.api.openapi import Schema, nullable

_UNIT = {"minimum": 0, "maximum": 1}
_PENALTY = {"minimum": -2, "maximum": 2}
_INT64 = {"minimum": -(2**63), "maximum": 2**63 - 1}
_TEXTS: Schema = {"type": "array", "items": {"type": "string"}}
_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_OBJECT = nullable("object")

_SAMPLING: dict[str, Schema] = {
    "temperature": nullable("number", minimum=0, maximum=2),
    "top_p": nullable("number", minimum=1e-6, maximum=1),
    "top_k": nullable("integer", minimum=-1),
    "min_p": nullable("number", **_UNIT),
    "repetition_penalty": nullable("number", minimum=0.01, maximum=100),
    "presence_penalty": nullable("number", **_PENALTY),
    "frequency_penalty": nullable("number", **_PENALTY),
    "logit_bias": nullable("object", additionalProperties={"type": "number"}),
    "seed": nullable("integer", **_INT64),
    "stop": {"oneOf": [{"type": ["string", "null"]}, {**_TEXTS, "maxItems": 64}]},
    "stop_token_ids": nullable("array", items=_IDS["items"]),
    "include_stop_str_in_output": nullable("boolean"),
    "skip_special_tokens": nullable("boolean"),
    "spaces_between_special_tokens": nullable("boolean"),
    "ignore_eos": nullable("boolean"),
    "min_tokens": nullable("integer", minimum=0),
    "bad_words": nullable("array", items={"type": "string"}),
    "allowed_token_ids": nullable("array", items=_IDS["items"]),
    "thinking_token_budget": nullable("integer", minimum=-1),
    "prompt_logprobs": nullable("integer", minimum=-1),
    "n": nullable("integer", minimum=1, maximum=128),
    "speculative": nullable(
        "object",
        properties={"enabled": nullable("boolean"), "max_draft": nullable("integer", minimum=0)},
    ),
}
_STRUCTURE: dict[str, Schema] = {
    "response_format": nullable(
        "object",
        properties={
            "type": {"enum": ["text", "json_object", "json_schema", "structural_tag"]},
            "json_schema": nullable("object"),
        },
    ),
    "structured_outputs": _OBJECT,
    "guided_json": {"type": ["object", "string", "null"]},
    "guided_regex": nullable("string"),
    "guided_choice": nullable("array", items={"type": "string"}),
    "guided_grammar": nullable("string"),
    "json_schema": {"type": ["object", "string", "null"]},
    "regex": nullable("string"),
    "ebnf": nullable("string"),
}
_TERMS: dict[str, Schema] = {
    "model": nullable("string"),
    "stream": nullable("boolean"),
    "stream_options": nullable(
        "object",
        properties={"include_usage": nullable("boolean"), "continuous_usage_stats": nullable("boolean")},
    ),
    "priority": nullable("integer", minimum=-(2**31), maximum=2**31 - 1),
    "timeout": nullable("number", exclusiveMinimum=0),
    "cache_salt": nullable("string", minLength=1, maxLength=256),
    "request_id": nullable("string", maxLength=256),
    "return_token_ids": nullable("boolean"),
    "return_tokens_as_token_ids": nullable("boolean"),
    "return_spec": nullable("boolean"),
    "user": nullable("string"),
    "add_special_tokens": nullable("boolean"),
    "truncate_prompt_tokens": nullable("integer", minimum=-1),
    "truncation_side": nullable("string", enum=["left", "right", None]),
}
_MESSAGE: Schema = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"type": "string"},
        "content": {
            "oneOf": [
                {"type": ["string", "null"]},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["type", "text"],
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                    },
                },
            ]
        },
        "reasoning": nullable("string"),
        "reasoning_content": nullable("string"),
        "tool_calls": nullable("array", items={"type": "object"}),
        "tool_call_id": nullable("string"),
        "function_call": nullable("object"),
        "name": nullable("string"),
    },
}

COMPLETION_REQUEST: Schema = {
    "type": "object",
    "required": ["prompt"],
    "properties": {
        "prompt": {"oneOf": [{"type": "string", "minLength": 1}, _TEXTS, _IDS, {"type": "array", "items": _IDS}]},
        "max_tokens": nullable("integer", minimum=0),
        "logprobs": nullable("integer", minimum=-1),
        "echo": nullable("boolean"),
        "best_of": nullable("integer", minimum=1),
        **_SAMPLING,
        **_STRUCTURE,
        **_TERMS,
    },
}
CHAT_REQUEST: Schema = {
    "type": "object",
    "required": ["messages"],
    "properties": {
        "messages": {"type": "array", "minItems": 1, "items": _MESSAGE},
        "max_completion_tokens": nullable("integer", minimum=1),
        "max_tokens": nullable("integer", minimum=1),
        "logprobs": nullable("boolean"),
        "top_logprobs": nullable("integer", minimum=-1),
        "tools": nullable("array", items={"type": "object"}),
        "tool_choice": {"type": ["string", "object", "null"]},
        "parallel_tool_calls": nullable("boolean"),
        "functions": nullable("array", items={"type": "object"}),
        "function_call": {"type": ["string", "object", "null"]},
        "reasoning_effort": nullable("string"),
        "enable_thinking": nullable("boolean"),
        "include_reasoning": nullable("boolean"),
        "separate_reasoning": nullable("boolean"),
        "chat_template": nullable("string"),
        "chat_template_kwargs": _OBJECT,
        "add_generation_prompt": nullable("boolean"),
        "continue_final_message": nullable("boolean"),
        "add_special_tokens": nullable("boolean"),
        "echo": nullable("boolean"),
        "documents": nullable("array", items={"type": "object"}),
        **_SAMPLING,
        **_STRUCTURE,
        **_TERMS,
    },
}
_USAGE: Schema = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "properties": {name: {"type": "integer"} for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
}


def _answer(object_name: str, content: str) -> Schema:
    choice = {"type": "object", "required": ["index", content, "finish_reason"]}
    return {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": object_name},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "choices": {"type": "array", "items": choice},
            "usage": _USAGE,
        },
    }


COMPLETION = _answer("text_completion", "text")
CHAT_COMPLETION = _answer("chat.completion", "message")
ANY_REQUEST: Schema = {"anyOf": [CHAT_REQUEST, COMPLETION_REQUEST]}
ANY_ANSWER: Schema = {"anyOf": [CHAT_COMPLETION, COMPLETION]}
MODEL: Schema = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by", "max_model_len", "type", "display_name", "created_at"],
    "properties": {
        "type": {"const": "model"},
        "display_name": {"type": "string"},
        "created_at": {"type": "string", "format": "date-time"},
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
        "max_model_len": {"type": "integer"},
    },
}
MODEL_LIST: Schema = {
    "type": "object",
    "required": ["object", "data", "has_more", "first_id", "last_id"],
    "properties": {
        "object": {"const": "list"},
        "data": {"type": "array", "items": MODEL},
        "has_more": {"const": False},
        "first_id": {"type": "string"},
        "last_id": {"type": "string"},
    },
}
