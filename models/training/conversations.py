"""What the demo model reads in training: chats about problems, plain completions and a little small talk.

Knows text only. Every text is a prompt and the completion that follows it; only the completion is what the model is
there to learn.
"""

import random
from dataclasses import dataclass

from models.training.demo_tokenizer import END_OF_TEXT, END_OF_TURN, render_chat
from models.training.word_problems import draw_drill, draw_problem

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
    draw = rng.choices((_draw_chat, draw_plain, _draw_drill, _draw_small_talk), weights=(57, 25, 15, 3))[0]
    return draw(rng)


def chat_prompt(question: str) -> str:
    """Give the prompt of a chat that asks one question."""
    return render_chat([{"role": "user", "content": question}])


def plain_prompt(question: str) -> str:
    """Give the prompt of a plain completion that asks one question."""
    return f"Question: {question}\nAnswer:"


def draw_plain(rng: random.Random) -> Text:
    """Draw one problem as a plain completion."""
    problem = draw_problem(rng)
    return Text(plain_prompt(problem.question), f" {problem.answer}{END_OF_TEXT}")


def _draw_chat(rng: random.Random) -> Text:
    """Draw a chat about one problem, sometimes after a system prompt or small talk."""
    problem = draw_problem(rng)
    messages = _draw_opening(rng) + [{"role": "user", "content": problem.question}]
    return Text(render_chat(messages), problem.answer + END_OF_TURN)


def _draw_drill(rng: random.Random) -> Text:
    """Draw a chat about one bare calculation."""
    drill = draw_drill(rng)
    return Text(chat_prompt(drill.question), drill.answer + END_OF_TURN)


def _draw_small_talk(rng: random.Random) -> Text:
    """Draw one of the fixed turns of small talk, sometimes after a system prompt."""
    question, answer = rng.choice(tuple(SMALL_TALK.items()))
    system = [_system_message(rng)] if rng.random() < 0.3 else []
    return Text(render_chat([*system, {"role": "user", "content": question}]), answer + END_OF_TURN)


def _draw_opening(rng: random.Random) -> list[dict[str, str]]:
    """Draw what precedes the question: mostly nothing, else a system prompt or one turn of small talk."""
    kind = rng.random()
    if kind < 0.8:
        return []
    if kind < 0.95:
        return [_system_message(rng)]
    question, answer = rng.choice(tuple(SMALL_TALK.items()))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _system_message(rng: random.Random) -> dict[str, str]:
    """Draw one of the system prompts as a message."""
    return {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}
