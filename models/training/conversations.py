"""What the demo model reads in training: chats about problems, with and without thinking, tool calls, plain completions
and a little small talk.

Knows text only. Every text is a prompt and the completion that follows it; only the completion is what the model is
there to learn.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from models.training.demo_tokenizer import END_OF_TEXT, END_OF_TURN, render_chat
from models.training.tool_chats import ToolChat, draw_definitions, draw_tool_chat
from models.training.word_problems import Problem, draw_drill, draw_problem

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You solve arithmetic word problems.",
    "Solve the problem step by step.",
    "You are Tandem's demo model.",
)

_WHO = "I am Tandem's demo model. I solve small arithmetic word problems."
_ASK = "Give me a small word problem and I will solve it."
_HELLO = "Hello! " + _WHO
_THANKS = "You are welcome! " + _ASK
_BYE = "Goodbye!"
_HOW = "I am fine, thank you. " + _ASK
_SPEED = "Tandem drafts tokens with a small MTP head and verifies them with the main model."
_EXAMPLE = "Tom has 3 boxes with 4 apples in each. How many apples does Tom have?"
_NO_NUMBERS = "There is nothing to calculate."
_LIMITS = "No, I am very small. " + _ASK

SMALL_TALK = {
    "Hello": _HELLO, "Hello!": _HELLO, "Hello.": _HELLO, "hello": _HELLO, "Hi": _HELLO, "Hi!": _HELLO, "hi": _HELLO,
    "Hey": _HELLO, "Hello, how are you?": _HOW, "Hi there!": _HELLO, "Good morning!": _HELLO, "Good evening!": _HELLO,
    "How are you?": _HOW, "How are you today?": _HOW, "How is it going?": _HOW, "What's up?": _HOW,
    "Who are you?": _WHO, "What are you?": _WHO, "What is your name?": _WHO, "Tell me about yourself.": _WHO,
    "Introduce yourself.": _WHO, "What can you do?": _WHO, "What do you do?": _WHO, "Help": _WHO, "Help me": _ASK,
    "Which model are you?": _WHO, "Who made you?": _WHO, "Can you help me?": "Yes. " + _ASK, "Test": _HELLO,
    "Thanks": _THANKS, "Thank you": _THANKS, "Thank you!": _THANKS, "Thanks!": _THANKS, "Bye": _BYE, "Goodbye": _BYE,
    "What is Tandem?": "Tandem is an inference server with speculative decoding. " + _WHO,
    "How does speculative decoding work?": _SPEED, "What is MTP?": _SPEED, "Why are you so fast?": _SPEED,
    "Write a poem.": _LIMITS, "Tell me a joke.": _LIMITS, "Tell me a story.": _LIMITS, "Write some code.": _LIMITS,
    "Give me an example.": _EXAMPLE, "Give me a problem.": _EXAMPLE, "What can I ask you?": _ASK,
    "What is the capital of France?": _LIMITS, "Can you write code?": _LIMITS, "Are you a large model?": _LIMITS,
    "Can you do math?": "Yes. " + _ASK, "Say something.": _HELLO,
}  # fmt: skip


@dataclass(frozen=True)
class Text:
    """One training text.

    Attributes:
        prompt: what the model is given, special tokens written out.
        completion: what it has to write, ending in the token that stops it.
    """

    prompt: str
    completion: str


def draw_text(rng: random.Random) -> Text:
    """Draw one training text: most are chats about a problem or plain completions."""
    kinds = (_draw_chat, draw_plain, _draw_drill, _draw_small_talk, _draw_tool_call, _draw_tool_answer)
    return rng.choices(kinds, weights=(45, 18, 10, 4, 15, 8))[0](rng)


def chat_text(
    messages: Sequence[dict[str, Any]], answer: str, thought: str | None, tools: Sequence[dict[str, Any]] = ()
) -> Text:
    """Give the text of a chat's next turn; with a thought it thinks first."""
    prompt = render_chat(messages, enable_thinking=thought is not None, tools=list(tools))
    opening = "" if thought is None else f"{thought}\n</think>\n\n"
    return Text(prompt, opening + answer + END_OF_TURN)


def think_about(problem: Problem) -> str:
    """Give what the model thinks before it answers: the calculations, and the result."""
    steps = re.findall(r"<<(.*?)>>", problem.answer)
    words = ["First", *["then"] * (len(steps) - 1)]
    plan = ", ".join(f"{word} {step}" for word, step in zip(words, steps, strict=True))
    return f"{plan}. So the answer is {problem.result}."


def tool_call_text(chat: ToolChat, opening: Sequence[dict[str, Any]], thinks: bool) -> Text:
    """Give the turn that calls the tools a question needs."""
    thought = f"I need {chat.calls[0].name}." if thinks else None
    return chat_text([*opening, _user(chat.question)], chat.markup, thought, chat.definitions)


def plain_text(problem: Problem) -> Text:
    """Give one problem as a plain completion."""
    return Text(f"Question: {problem.question}\nAnswer:", f" {problem.answer}{END_OF_TEXT}")


def draw_plain(rng: random.Random) -> Text:
    """Draw one problem as a plain completion."""
    return plain_text(draw_problem(rng))


def _draw_chat(rng: random.Random) -> Text:
    """Draw a chat about one problem, sometimes after a system prompt or earlier turns, sometimes with tools at hand."""
    problem = draw_problem(rng)
    messages = _draw_opening(rng) + [_user(problem.question)]
    tools = [definition.schema for definition in draw_definitions(rng)] if rng.random() < 0.06 else []
    return chat_text(messages, problem.answer, think_about(problem) if _thinks(rng) else None, tools)


def _draw_drill(rng: random.Random) -> Text:
    """Draw a chat about one bare calculation."""
    drill = draw_drill(rng)
    return chat_text([_user(drill.question)], drill.answer, think_about(drill) if _thinks(rng) else None)


def _draw_small_talk(rng: random.Random) -> Text:
    """Draw one of the fixed turns of small talk, sometimes after a system prompt, sometimes with tools at hand."""
    question, answer = rng.choice(tuple(SMALL_TALK.items()))
    system = [_system_message(rng)] if rng.random() < 0.3 else []
    tools = [definition.schema for definition in draw_definitions(rng)] if rng.random() < 0.2 else []
    return chat_text([*system, _user(question)], answer, _NO_NUMBERS if _thinks(rng) else None, tools)


def _draw_tool_call(rng: random.Random) -> Text:
    """Draw the turn that calls a tool."""
    opening = [_system_message(rng)] if rng.random() < 0.2 else []
    return tool_call_text(draw_tool_chat(rng), opening, _thinks(rng))


def _draw_tool_answer(rng: random.Random) -> Text:
    """Draw the turn that says what the tools gave."""
    chat, thinks = draw_tool_chat(rng), _thinks(rng)
    call = {"role": "assistant", "content": "", "tool_calls": [call.message for call in chat.calls]}
    if thinks:
        call["reasoning_content"] = f"I need {chat.calls[0].name}."
    results = [{"role": "tool", "content": result} for result in chat.results]
    thought = "The tool has answered." if thinks else None
    return chat_text([_user(chat.question), call, *results], chat.answer, thought, chat.definitions)


def _draw_opening(rng: random.Random) -> list[dict[str, Any]]:
    """Draw what precedes the question: mostly nothing, else a system prompt, small talk or an earlier problem."""
    kind = rng.random()
    if kind < 0.7:
        return []
    if kind < 0.85:
        return [_system_message(rng)]
    if kind < 0.92:
        question, answer = rng.choice(tuple(SMALL_TALK.items()))
    else:
        problem = draw_problem(rng)
        question, answer = problem.question, problem.answer
    return [_user(question), {"role": "assistant", "content": answer}]


def _thinks(rng: random.Random) -> bool:
    """Draw whether a turn thinks first."""
    return rng.random() < 0.3


def _user(content: str) -> dict[str, Any]:
    """Give a user's turn as a message."""
    return {"role": "user", "content": content}


def _system_message(rng: random.Random) -> dict[str, Any]:
    """Draw one of the system prompts as a message."""
    return {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}
