"""Asks an OpenAI-compatible server GSM8K's questions: prompts, requests and answers."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from benchmarks.gsm8k.problems import Problem, parse_answer
from benchmarks.openai_server import RunFailed, Server, one_line

STOP = ("Question", "Assistant:", "<|separator|>")  # as SGLang's and vLLM's scripts have them
END_OF_THOUGHT = "</think>"


@dataclass(frozen=True)
class Answer:
    """A server's output for one question: reasoning, if it came apart, stands before an END_OF_THOUGHT in `text`.

    `value` is the number it gives, None where there is none (*invalid*); `num_tokens` are output tokens.
    """

    text: str
    finish_reason: str
    num_tokens: int
    value: Decimal | None

    @property
    def is_truncated(self) -> bool:
        """Whether it was cut off, so that its number may be none of its own conclusions."""
        return self.finish_reason != "stop"


def completion_prompt(shots: Sequence[Problem], problem: Problem) -> str:
    """Solved examples and the question, as plain text."""
    solved = "".join(f"Question: {shot.question}\nAnswer: {shot.answer}\n\n" for shot in shots)
    return f"{solved}Question: {problem.question}\nAnswer:"


def chat_messages(shots: Sequence[Problem], problem: Problem) -> list[dict[str, str]]:
    """Solved examples and the question, as turns."""
    turns = [(role, text) for shot in shots for role, text in (("user", shot.question), ("assistant", shot.answer))]
    return [{"role": role, "content": text} for role, text in [*turns, ("user", problem.question)]]


def ask(server: Server, shots: Sequence[Problem], problem: Problem, args: argparse.Namespace) -> Answer:
    """One question, one answer. Raises RunFailed."""
    payload = {"model": server.model, "max_tokens": args.max_tokens, "temperature": args.temperature}
    if args.temperature > 0:
        payload["seed"] = problem.number
    if args.chat:
        variables = {"enable_thinking": args.thinking == "on"}
        payload |= {"messages": chat_messages(shots, problem), "chat_template_kwargs": variables}
    else:
        payload |= {"prompt": completion_prompt(shots, problem), "stop": list(STOP)}
    path = "/v1/chat/completions" if args.chat else "/v1/completions"
    try:
        return read_answer(server.send(path, payload), thinks=args.chat and args.thinking == "on")
    except RunFailed as error:
        raise RunFailed(f"question {problem.number}: {error}") from error


def read_answer(response: dict[str, Any], thinks: bool) -> Answer:
    """The answer in a response of either endpoint; its number stands after what was thought. Raises RunFailed."""
    try:
        choice, num_tokens = response["choices"][0], int(response["usage"]["completion_tokens"])
        finish_reason = str(choice["finish_reason"])
        text = _message_text(choice["message"]) if "message" in choice else str(choice["text"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {one_line(error)}"
        raise RunFailed(f"the response is not as OpenAI's are ({what})") from error
    _, ended, said = text.rpartition(END_OF_THOUGHT)
    is_only_thought = thinks and not ended and finish_reason != "stop"
    return Answer(text, finish_reason, num_tokens, None if is_only_thought else parse_answer(said))


def _message_text(message: dict[str, Any]) -> str:
    thought = message.get("reasoning") or message.get("reasoning_content")
    return (f"{thought}{END_OF_THOUGHT}" if thought else "") + (message["content"] or "")
