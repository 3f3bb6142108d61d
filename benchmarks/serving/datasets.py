"""What is asked: endless streams of conversations, the same for the same seed. Knows no server.

Lengths are tokens where prompts are token ids, and words where the server or the endpoint takes text only.
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.gsm8k.client import STOP, chat_messages, completion_prompt
from benchmarks.gsm8k.problems import choose_problems
from benchmarks.openai_server import RunFailed, one_line
from benchmarks.word_problems import draw_problem, draw_question

CHAT, COMPLETIONS = "chat", "completions"
# Those made of tokens that mean nothing, which a server may take as they are.
MEANINGLESS = ("random", "shared-prefix")
FROM_FILES = ("sharegpt", "gsm8k")
DATASETS = (*MEANINGLESS, "multi-turn", *FROM_FILES, "word-problems")
OUTPUT_LEN, GSM8K_OUTPUT_LEN = 128, 512
CHARS_PER_TOKEN = 4
_ASKERS, _ANSWERERS = ("human", "user"), ("gpt", "assistant", "chatgpt", "bing", "bard")
# Frequent and short: one token each with most tokenizers.
_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work number night point home water room mother area money "
    "story fact month lot right study book eye job word business issue side kind head house service friend father "
    "power hour game line end member law car city"
)

Said = str | list[int]
Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """The part of a request's body that says what is asked, and the longest answer in tokens."""

    content: dict[str, Any]
    max_tokens: int

    @classmethod
    def saying(cls, text: str, max_tokens: int, endpoint: str) -> Self:
        """A text for either endpoint."""
        chat = {"messages": [{"role": "user", "content": text}]}
        return cls(chat if endpoint == CHAT else {"prompt": text}, max_tokens)


@dataclass(frozen=True)
class Turn:
    """What one request adds to a conversation, and the longest answer in tokens."""

    said: Said
    max_tokens: int


@dataclass(frozen=True)
class Conversation:
    """Requests that follow one another, each with all that was said before. Token ids stand alone, in one turn."""

    endpoint: str
    turns: Sequence[Turn]
    opening: Sequence[Message] = ()
    stop: tuple[str, ...] = ()

    def prompt(self, answers: Sequence[str]) -> Prompt:
        """The request that follows these answers."""
        turn = self.turns[len(answers)]
        stop = {"stop": list(self.stop)} if self.stop else {}
        if self.endpoint == CHAT:
            messages = [*self.opening, *self._messages(answers), {"role": "user", "content": turn.said}]
            return Prompt({"messages": messages} | stop, turn.max_tokens)
        if not isinstance(turn.said, str):
            return Prompt({"prompt": turn.said} | stop, turn.max_tokens)
        before = "".join(f"{earlier.said}{answer}\n" for earlier, answer in zip(self.turns, answers, strict=False))
        return Prompt({"prompt": before + turn.said} | stop, turn.max_tokens)

    def _messages(self, answers: Sequence[str]) -> list[dict[str, Said]]:
        said = [("user", turn.said) for turn in self.turns[: len(answers)]]
        pairs = zip(said, (("assistant", answer) for answer in answers), strict=True)
        return [{"role": role, "content": text} for pair in pairs for role, text in pair]


@dataclass(frozen=True)
class Dataset:
    """Conversations without end. `size` is how many differ, None where all do; `skipped` how many were broken."""

    conversations: Iterator[Conversation]
    size: int | None = None
    skipped: int = 0


def make_dataset(args: argparse.Namespace, takes_ids: bool) -> Dataset:
    """The one that `args` ask for; `takes_ids` says that prompts may be token ids. Raises RunFailed."""
    rng = random.Random(args.seed)
    if args.dataset == "sharegpt":
        return _read_sharegpt(args, rng)
    if args.dataset == "gsm8k":
        return _read_gsm8k(args)
    filler = _Filler(rng, args.vocab_size if takes_ids else None)
    draw = {
        "random": _draw_random,
        "shared-prefix": _draw_shared_prefix,
        "multi-turn": _draw_multi_turn,
        "word-problems": _draw_word_problems,
    }[args.dataset]
    return Dataset(draw(args, filler))


class _Filler:
    """Draws tokens that mean nothing: ids below `vocab_size`, or words where there is none."""

    def __init__(self, rng: random.Random, vocab_size: int | None):
        self.rng = rng
        self._vocab_size = vocab_size

    def draw(self, count: int) -> Said:
        """So many tokens or words."""
        if self._vocab_size is None:
            return " ".join(self.rng.choices(_WORDS.split(), k=count))
        return self.rng.choices(range(self._vocab_size), k=count)

    def spread(self, mean: int, ratio: float) -> int:
        """A length in mean * (1 - ratio) .. mean * (1 + ratio), at least 1."""
        return self.rng.randint(max(1, int(mean * (1 - ratio))), int(mean * (1 + ratio)))


def _draw_random(args: argparse.Namespace, filler: _Filler) -> Iterator[Conversation]:
    while True:
        said = filler.draw(filler.spread(args.input_len, args.range_ratio))
        yield Conversation(args.endpoint, [Turn(said, _output_len(args, filler))])


def _draw_shared_prefix(args: argparse.Namespace, filler: _Filler) -> Iterator[Conversation]:
    prefixes = [filler.draw(args.prefix_len) for _ in range(args.num_groups)]
    while True:
        said = _join(filler.rng.choice(prefixes), filler.draw(filler.spread(args.input_len, args.range_ratio)))
        yield Conversation(args.endpoint, [Turn(said, _output_len(args, filler))])


def _join(prefix: Said, rest: Said) -> Said:
    if isinstance(prefix, str):
        return f"{prefix} {rest}"
    assert not isinstance(rest, str)
    return prefix + rest


def _draw_multi_turn(args: argparse.Namespace, filler: _Filler) -> Iterator[Conversation]:
    frame = "{}" if args.endpoint == CHAT else "User: {}\nAssistant:"
    while True:
        said = [filler.draw(filler.spread(args.input_len, args.range_ratio)) for _ in range(args.num_turns)]
        turns = [Turn(frame.format(text), _output_len(args, filler)) for text in said]
        yield Conversation(args.endpoint, turns)


def _draw_word_problems(args: argparse.Namespace, filler: _Filler) -> Iterator[Conversation]:
    draw = draw_question if args.endpoint == CHAT else draw_problem
    while True:
        yield Conversation(args.endpoint, [Turn(draw(filler.rng), args.output_len or OUTPUT_LEN)])


def _output_len(args: argparse.Namespace, filler: _Filler) -> int:
    return filler.spread(args.output_len or OUTPUT_LEN, args.range_ratio)


def _read_gsm8k(args: argparse.Namespace) -> Dataset:
    choice = argparse.Namespace(data=args.data, subset="main", num_questions=None, shots=args.shots)
    shots, problems, num_broken = choose_problems(choice)
    max_tokens = args.output_len or GSM8K_OUTPUT_LEN
    if args.endpoint == CHAT:
        opening = chat_messages(shots, problems[0])[:-1]
        asked = [Conversation(CHAT, [Turn(one.question, max_tokens)], opening) for one in problems]
    else:
        prompts = [completion_prompt(shots, problem) for problem in problems]
        asked = [Conversation(COMPLETIONS, [Turn(prompt, max_tokens)], stop=STOP) for prompt in prompts]
    return Dataset(itertools.cycle(asked), len(asked), num_broken)


def _read_sharegpt(args: argparse.Namespace, rng: random.Random) -> Dataset:
    """The first question of every conversation; answers may be as long as the recorded ones are, about."""
    entries = _read_entries(Path(args.data))
    pairs = [pair for entry in entries if (pair := _first_exchange(entry)) is not None]
    if not pairs:
        raise RunFailed(
            f"{args.data} has no entry with a question and an answer in `conversations` ({len(entries)} are broken); "
            "is it in ShareGPT's form?"
        )
    rng.shuffle(pairs)
    asked = [
        Conversation(args.endpoint, [Turn(question, args.output_len or max(1, len(answer) // CHARS_PER_TOKEN))])
        for question, answer in pairs
    ]
    return Dataset(itertools.cycle(asked), len(asked), len(entries) - len(pairs))


def _read_entries(path: Path) -> list[Any]:
    """Entries of a JSON list, or of JSON lines; a line that is not JSON gives None."""
    try:
        data = path.read_bytes()
        if data.lstrip().startswith(b"["):
            entries: list[Any] = json.loads(data)
            return entries
    except (OSError, ValueError) as error:
        raise RunFailed(f"cannot read {path}: {one_line(error)}") from error
    return [_read_line(line) for line in data.split(b"\n") if line.strip()]


def _read_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _first_exchange(entry: Any) -> tuple[str, str] | None:
    conversation = entry.get("conversations") if isinstance(entry, dict) else None
    said = [part for part in conversation if isinstance(part, dict)] if isinstance(conversation, list) else []
    for question, answer in itertools.pairwise(said):
        texts = question.get("value"), answer.get("value")
        if question.get("from") in _ASKERS and answer.get("from") in _ANSWERERS and all(_is_text(x) for x in texts):
            return str(texts[0]), str(texts[1])
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != ""
