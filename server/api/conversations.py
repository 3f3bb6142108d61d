"""What the endpoints for conversations that are not OpenAI's first have in common: the job behind a request.

They read messages, tools and a few fields in forms of their own; all else is what a chat request says by the same
names. Every mistake is an InvalidRequest.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from server.api.chat import ChatJob, read_message_masks
from server.api.chat_format import MessageRules
from server.api.chat_messages import Message
from server.api.constraints import MASK_FIELDS
from server.api.fields import Fields, known_fields, shown, shown_json, split_list
from server.api.prompts import ChatPrompt, PromptReader
from server.api.requests import read_request_id
from server.api.sampling import SAMPLING_FIELDS, read_max_tokens, read_sampling
from server.api.services import Services
from server.api.terms import TERM_FIELDS, read_terms
from server.api.thinking import END_OF_THINKING
from server.api.tools import AUTO, MAX_TOOLS, NONE, Choice, Tool, Tools, build_tools
from server.errors import InvalidRequest
from server.messages import Constraint

CONVERSATION_FIELDS = (
    *("model", "stream", "request_id", "tools", "tool_choice", "chat_template_kwargs"),
    *SAMPLING_FIELDS,
    *MASK_FIELDS,
    *TERM_FIELDS,
)

_FORMAT = known_fields("type", "schema")
_FORMATS = ("text", "json_object", "json_schema")

J = TypeVar("J", bound=ChatJob)


@dataclass(frozen=True)
class Conversation:
    """What the model is to answer: `messages` as a chat template reads them, which came as the field `field`, and
    `tools`. The last message goes on if it `continues`; `thinks` None leaves it to the template whether it thinks, and
    `thinking_budget` is the most tokens that it may take for it."""

    messages: list[Message]
    field: str
    tools: Tools | None
    thinks: bool | None
    continues: bool = False
    thinking_budget: int | None = None

    def encode(self, fields: Fields, prompts: PromptReader) -> ChatPrompt:
        """The prompt of it; `fields` may set more variables for the chat template."""
        by_field = {} if self.thinks is None else {"enable_thinking": self.thinks}
        return prompts.encode_chat(
            self.messages,
            {**by_field, **fields.mapping("chat_template_kwargs")},
            None if self.tools is None else self.tools.definitions,
            self.field,
            self.continues,
        )


def read_job(
    fields: Fields,
    services: Services,
    read_conversation: Callable[[Fields], Conversation],
    max_tokens_name: str,
    make_job: Callable[..., J],
    form: Constraint | None = None,
    **changes: Any,
) -> J:
    """One answer to a conversation, by the fields of `CONVERSATION_FIELDS`. Its content has the `form`; `changes` are
    settings of sampling that have names of their own. Without `max_tokens_name` it may take the rest of the context."""
    max_tokens = read_max_tokens(fields, (max_tokens_name,), None, services.limits)
    sampling = replace(read_sampling(fields, services.limits), max_tokens=max_tokens, **changes)
    terms, stream = read_terms(fields), fields.boolean("stream", False)
    request_id = read_request_id(fields, "request_id")
    conversation = read_conversation(fields)
    tools = conversation.tools
    prompt = conversation.encode(fields, services.prompts)
    masks = read_message_masks(fields, tools, prompt, services, form)
    end_id = services.tokenizer.token_id(END_OF_THINKING)
    if conversation.thinking_budget is not None and prompt.is_thinking and end_id is not None:
        masks |= {"thinking_budget": conversation.thinking_budget, "think_end_id": end_id}
    return make_job(
        prompts=[prompt.token_ids],
        sampling=replace(sampling, **masks),
        n=1,
        terms=terms,
        stream=stream,
        request_id=request_id,
        rules=MessageRules(tools, prompt.is_thinking),
    )


def read_form(fields: Fields) -> Constraint | None:
    """What the field `format` asks of the content."""
    form = Fields(_FORMAT, fields.raw("format") or b'{"type":"text"}', fields.name("format"))
    kind, schema = form.value("type"), form.raw("schema")
    if kind not in _FORMATS:
        rule = f"it must be one of {', '.join(_FORMATS)}"
        raise InvalidRequest(f"{form.name('type')} is {shown(kind)}, {rule}", form.name("type"))
    if kind == "json_schema" and schema[:1] != b"{":
        rule = "it must be a JSON schema, which is an object"
        raise InvalidRequest(f"{form.name('schema')} is {shown_json(schema)}, {rule}", form.name("schema"))
    constraint = Constraint(kind, schema.decode() if kind == "json_schema" else "", field=fields.name("format"))
    if kind == "text":
        return None
    constraint.check()
    return constraint


def read_flat_tools(
    fields: Fields, choice: Choice, is_parallel: bool, read_tool: Callable[[bytes, str], Tool]
) -> Tools | None:
    """The tools of a request for which no tools, and a choice among none, are nothing out of the ordinary."""
    if choice in (Choice(AUTO), Choice(NONE)) and not split_list("tools", fields.raw("tools") or b"[]", MAX_TOOLS):
        return None
    return build_tools(fields, choice, is_parallel, read_tool)
