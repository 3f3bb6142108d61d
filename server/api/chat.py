"""POST /v1/chat/completions: its fields."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request, Response

from server.api.chat_format import ChatFormat, FirstCall, MessageRules
from server.api.constraints import read_masks
from server.api.fields import Fields
from server.api.generation import Job
from server.api.prompts import ChatPrompt
from server.api.requests import read_stream, respond
from server.api.sampling import MAX_CHOICES, Limits, read_max_tokens, read_num_logprobs, read_sampling
from server.api.services import Services
from server.api.terms import read_terms
from server.api.thinking import END_OF_THINKING, read_reasoning
from server.api.tools import AUTO, REQUIRED, Tools, read_tools, tool_constraint
from server.errors import InvalidRequest
from server.messages import Constraint

_MAX_TOKENS_NAMES = ("max_completion_tokens", "max_tokens")
_FORMAT_FIELD = "response_format"


@dataclass(frozen=True, kw_only=True)
class ChatJob(Job):
    """A job whose answer is a message by these `rules`."""

    rules: MessageRules

    def watch(self) -> Callable[[str], bool] | None:
        """Where one call may be made at most, it ends the answer."""
        tools = self.rules.tools
        is_open = tools is None or tools.is_parallel
        return None if is_open else FirstCall(self.rules, self.sampling.min_tokens).ends_with


async def answer_chat(request: Request, services: Services) -> Response:
    """Answer one chat request. Raises TandemError for what must be an HTTP error."""
    return await respond(
        request,
        services,
        lambda fields: read_chat_job(fields, services),
        lambda job: ChatFormat(services.tokenizer, job, job.rules),
    )


def read_chat_job(fields: Fields, services: Services) -> ChatJob:
    """What a chat request asks for; max_tokens defaults to the rest of the context. Raises InvalidRequest."""
    sampling = replace(
        read_sampling(fields, services.limits),
        max_tokens=read_max_tokens(fields, _MAX_TOKENS_NAMES, None, services.limits),
        logprobs=_read_logprobs(fields, services.limits),
    )
    n = fields.integer("n", 1, 1, MAX_CHOICES) or 1
    how, terms = read_stream(fields), read_terms(fields)
    tools, reasoning, echo = read_tools(fields), read_reasoning(fields), fields.boolean("echo", False)
    reader = services.prompts.for_output(sampling.max_tokens)
    prompt = reader.read_chat(fields, None if tools is None else tools.definitions)
    return ChatJob(
        prompts=[prompt.token_ids],
        sampling=replace(sampling, **read_message_masks(fields, tools, prompt, services)),
        n=n,
        terms=terms,
        rules=MessageRules(tools, prompt.is_thinking, reasoning, prompt.last_content if echo else ""),
        **how,
    )


def read_message_masks(
    fields: Fields, tools: Tools | None, prompt: ChatPrompt, services: Services, form: Constraint | None = None
) -> dict[str, Any]:
    """Which tokens of a message may come. A format of the content (`response_format`, or `form`) holds for a message
    without calls: one that may be made may come instead, one that must be made goes before it. What other fields
    demand holds for the whole output, so no call may be made, and none can be demanded."""
    tokenizer = services.tokenizer
    masks = read_masks(fields, tokenizer, services.limits.vocab_size, prompt.is_thinking)
    after = tokenizer.token_id(END_OF_THINKING) if prompt.is_thinking else None
    constraint, must_call = masks["constraint"], tools is not None and tools.choice != AUTO
    is_format = constraint is None or constraint.field == _FORMAT_FIELD
    if constraint is None and form is not None:
        constraint = replace(form, after_token_id=after)
    if tools is not None and must_call and not is_format:
        raise InvalidRequest(
            f"{tools.choice_name} demands a call and {constraint.field} another form of the output; leave one out",
            constraint.field,
        )
    if tools is not None and (constraint is None or must_call):
        constraint = tool_constraint(tools, after)
    elif tools is not None and is_format:
        call = tool_constraint(replace(tools, choice=REQUIRED), after)
        assert call is not None
        constraint = replace(constraint, alternative=(call.kind, call.text))
    return masks | {"constraint": constraint}


def _read_logprobs(fields: Fields, limits: Limits) -> int | None:
    wanted = fields.boolean("logprobs", False)
    num_top = read_num_logprobs(fields, "top_logprobs", limits) or 0
    if num_top and not wanted:
        raise InvalidRequest("top_logprobs is given without logprobs; set logprobs to true", "top_logprobs")
    return num_top if wanted else None
