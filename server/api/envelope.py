"""What surrounds the choices of an answer, whole or as events: id, usage, and what it tells of tokens, time and drafts.

Knows no endpoint but by its `Format`.
"""

import functools
import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

import msgspec
from fastapi import Response

from server.api.generation import Choice, Delta, Generation, Job
from server.api.logprobs import prompt_logprobs
from server.api.services import Services
from server.api.speculation_report import report_metrics, report_spec, report_timings
from server.api.transport import encode_event
from server.versions import read_version


class Format(Protocol):
    """How an endpoint writes its choices. What is told of a prompt stands in its choices, or beside them."""

    id_prefix: str
    object_name: str
    chunk_object_name: str
    prompt_in_choice: bool

    @property
    def num_reasoning_tokens(self) -> int:
        """Output tokens so far that are reasoning."""

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """The `choices` entries that stream one delta; none when there is nothing to say."""

    def empty_chunk(self, index: int) -> dict[str, Any]:
        """The `choices` entry that adds nothing to a choice."""

    def choice(self, choice: Choice, deltas: list[Delta]) -> dict[str, Any]:
        """The `choices` entry of a whole choice."""


class Envelope:
    """Writes one answer, which is told apart from others by `answer_id`."""

    def __init__(self, services: Services, form: Format, generation: Generation, job: Job, answer_id: str):
        self._services, self._form, self._generation, self._job = services, form, generation, job
        self._tells_versions = job.return_versions or services.config.enable_rl
        self._begun: set[int] = set()
        self._head = {
            "id": form.id_prefix + answer_id,
            "created": int(time.time()),
            "model": services.model_name,
            "system_fingerprint": _fingerprint(services.limits.mtp_step),
        }

    async def whole(self) -> Response:
        """The answer in one piece."""
        parts: list[list[Delta]] = [[] for _ in self._generation.choices]
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                parts[delta.index].append(delta)
        if self._job.takes_long_to_write(sum(choice.num_tokens for choice in self._generation.choices)):
            body = await self._services.do_apart(self._write, parts)
        else:
            body = self._write(parts)
        return Response(body, media_type="application/json")

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events, without the closing [DONE]."""
        ends_with_usage = self._job.include_usage or self._job.continuous_usage
        usage_before = self._usage() if self._job.continuous_usage else None
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                chunks, beside = self._chunks(delta)
                usage = self._usage() if self._job.continuous_usage else None
                for chunk in chunks[:-1]:  # a delta's tokens are told by its last chunk
                    yield self._encode([chunk], usage_before, beside)
                    beside = {}
                if delta.finish_reason is not None and not ends_with_usage and len(self._generation.choices) == 1:
                    beside = {**beside, **self._summarise()}
                if chunks:
                    yield self._encode(chunks[-1:], usage, beside)
                usage_before = usage
        if ends_with_usage:
            yield self._encode([], self._usage(), self._summarise())

    def _write(self, parts: Sequence[list[Delta]]) -> bytes:
        choices = []
        for index, choice in enumerate(self._kept(parts)):
            deltas = parts[choice.index]
            entry = {**self._form.choice(choice, deltas), "index": index, "token_ids": None, **self._tell(deltas)}
            choices.append({**entry, **self._tell_prompt(deltas[0])} if self._form.prompt_in_choice else entry)
        payload = {
            **self._head,
            "object": self._form.object_name,
            "choices": choices,
            "usage": self._usage(),
            "service_tier": None,
            **({} if self._form.prompt_in_choice else self._tell_prompt(parts[0][0])),
            **self._summarise(),
        }
        return msgspec.json.encode(payload)

    def _usage(self) -> dict[str, Any]:
        usage: dict[str, Any] = self._generation.usage()
        usage["completion_tokens_details"]["reasoning_tokens"] = self._form.num_reasoning_tokens
        return usage

    def _kept(self, parts: Sequence[list[Delta]]) -> list[Choice]:
        """The choices that are told: all of them, or the best of each prompt, best first."""
        choices, n = self._generation.choices, self._job.n
        if self._job.num_kept is None:
            return choices
        groups = [choices[start : start + n] for start in range(0, len(choices), n)]
        ranked = [sorted(group, key=lambda choice: -_mean_logprob(parts[choice.index])) for group in groups]
        return [choice for group in ranked for choice in group[: self._job.num_kept]]

    def _chunks(self, delta: Delta) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The `choices` entries of a delta, and what stands beside the first of them."""
        chunks, told = self._form.chunks(delta), self._tell([delta])
        if told:
            chunks = chunks or [self._form.empty_chunk(delta.index)]
            chunks[-1] = {**chunks[-1], **told}
        if not self._job.return_token_ids or delta.index in self._begun:
            return chunks, {}
        self._begun.add(delta.index)
        prompt = {"prompt_token_ids": self._prompt_of(delta)}
        if not self._form.prompt_in_choice:
            return chunks, prompt
        return [{**chunks[0], **prompt}, *chunks[1:]], {}

    def _tell(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """What the client wants to know of the steps behind a choice, or a part of it."""
        told: dict[str, Any] = {}
        if self._job.return_token_ids:
            told["token_ids"] = [token_id for delta in deltas for token_id in delta.token_ids]
        if self._job.return_spec:
            told["spec"] = report_spec(delta.spec for delta in deltas)
        if self._tells_versions and deltas[-1].finish_reason is not None:
            told["weight_versions"] = self._generation.choices[deltas[-1].index].version_spans()
        return told

    def _tell_prompt(self, first: Delta) -> dict[str, Any]:
        """What the client wants to know of a choice's prompt; null what it does not."""
        prompt, num_top = self._prompt_of(first), self._job.num_prompt_logprobs
        return {
            "prompt_token_ids": prompt if self._job.return_token_ids else None,
            "prompt_logprobs": None
            if num_top is None
            else prompt_logprobs(self._services.tokenizer, prompt, first.prompt_logprobs, num_top),
        }

    def _prompt_of(self, delta: Delta) -> list[int]:
        return self._job.prompts[delta.index // self._job.n]

    def _summarise(self) -> dict[str, Any]:
        """Time and drafts of the one choice; of several nobody could say whose they are."""
        if len(self._generation.choices) > 1:
            return {"metrics": None, "timings": None}
        (choice,), (prompt,) = self._generation.choices, self._job.prompts
        return {
            "metrics": report_metrics(choice, self._services.limits.mtp_step, self._job.return_spec),
            "timings": report_timings(choice, len(prompt)),
        }

    def _encode(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None, beside: dict[str, Any]) -> bytes:
        payload = {**self._head, "object": self._form.chunk_object_name, "choices": choices, **beside}
        if self._job.include_usage or usage is not None:
            payload["usage"] = usage
        return encode_event(payload)


@functools.cache
def _fingerprint(mtp_step: int) -> str:
    """What an answer depends on besides its request and the checkpoint."""
    return f"tandem-{read_version()}-mtp{mtp_step}"


def _mean_logprob(deltas: Sequence[Delta]) -> float:
    logprobs = [entry.logprob for delta in deltas for entry in delta.logprobs]
    return sum(logprobs) / len(logprobs) if logprobs else -math.inf
