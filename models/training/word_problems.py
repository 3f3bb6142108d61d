"""Fresh arithmetic word problems in GSM8K's answer form, drawn from the templates of `stories`.

Knows text and numbers, never tokens. A problem belongs to the held-out split by the hash of its question, so that the
problems of an evaluation never occur in training, whatever the seeds.
"""

import random
import re
import zlib
from dataclasses import dataclass

from models.training.stories import BOYS, DRILLS, GIRLS, GROUPS, RANGES, STORIES, THINGS, Story

LARGEST_RESULT = 200
LARGEST_FACTOR = 12  # of the smaller factor
LARGEST_QUOTIENT = 48
HELD_OUT_PARTS = 16  # one question in so many is held out

_ALTERNATIVES = re.compile(r"\(([^()]*\|[^()]*)\)")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_BACK_REFERENCE = re.compile(r"\\(\d)")
_STEP = re.compile(r"(?P<currency>\$?)\[(?P<left>\w+)(?P<operator>[-+*/])(?P<right>\w+)\]")
_FINAL_NUMBER = re.compile(r"####\s*(-?\d+)")


@dataclass(frozen=True)
class Problem:
    """One word problem.

    Attributes:
        question: the text of the problem.
        answer: one line per step with `<<3*4=12>>12`, then the line `#### 12`.
        result: the number after `####`.
    """

    question: str
    answer: str
    result: int

    @property
    def num_steps(self) -> int:
        """Calculations in the answer."""
        return self.answer.count("<<")


def draw_problem(rng: random.Random, held_out: bool = False, stories: tuple[Story, ...] = STORIES) -> Problem:
    """Draw one problem of a random template from the training split, or from the held-out one."""
    story = rng.choice(stories)
    while True:
        problem = _draw_from(story, rng)
        if problem is not None and is_held_out(problem.question) == held_out:
            return problem


def draw_drill(rng: random.Random) -> Problem:
    """Draw one bare calculation ("What is 23 + 48?") of the training split in the same answer form."""
    return draw_problem(rng, stories=DRILLS)


def is_held_out(question: str) -> bool:
    """Tell whether a question belongs to the held-out split."""
    return zlib.crc32(question.encode()) % HELD_OUT_PARTS == 0


def read_result(answer: str) -> int | None:
    """Read the number after the last `####`; None when there is none."""
    numbers = _FINAL_NUMBER.findall(answer)
    return int(numbers[-1]) if numbers else None


def _draw_from(story: Story, rng: random.Random) -> Problem | None:
    """Draw numbers, names and alternatives for one template; None when a step has no modest whole result."""
    numbers = {letter: rng.choice(RANGES[name]) for letter, name in zip("abcd", story.numbers.split(), strict=False)}
    words = _draw_words(rng) | {letter: str(number) for letter, number in numbers.items()}
    question, choices = _choose_alternatives(story.question, rng)
    lines = []
    for step_name, line in zip("xyz", story.solution, strict=False):
        step = _STEP.search(line)
        assert step is not None, line
        result = _calculate(_value(step["left"], numbers), step["operator"], _value(step["right"], numbers))
        if result is None:
            return None
        lines.append(line.replace(step[0], _write_step(step, numbers, result)))
        numbers[step_name] = result
    final = numbers["xyz"[len(lines) - 1]]
    answer = _fill("\n".join(lines), words, choices) + f"\n#### {final}"
    return Problem(_fill(question, words, choices), answer, final)


def _draw_words(rng: random.Random) -> dict[str, str]:
    """Draw two different people, two kinds of objects and a container, with the pronouns of the first person."""
    name, other = rng.sample(GIRLS + BOYS, 2)
    pronouns = ("she", "her", "her") if name in GIRLS else ("he", "his", "him")
    things, extras = rng.sample(THINGS, 2)
    words = {"name": name, "other": other, "things": things, "extras": extras, "group": rng.choice(GROUPS)}
    return words | dict(zip(("he", "his", "him"), pronouns, strict=True))


def _choose_alternatives(text: str, rng: random.Random) -> tuple[str, list[str]]:
    """Replace every `(one|two)` by one alternative; give the text and the choices in order."""
    choices: list[str] = []

    def choose(match: re.Match[str]) -> str:
        choices.append(rng.choice(match[1].split("|")))
        return choices[-1]

    return _ALTERNATIVES.sub(choose, text), choices


def _fill(text: str, words: dict[str, str], choices: list[str]) -> str:
    """Put words in place of the placeholders and earlier choices in place of `\\1`, `\\2`."""

    def fill(match: re.Match[str]) -> str:
        key = match[1]
        word = words[key.lower()]
        return word.capitalize() if key[0].isupper() else word

    text = _BACK_REFERENCE.sub(lambda match: choices[int(match[1]) - 1], text)
    return _PLACEHOLDER.sub(fill, text)


def _value(operand: str, numbers: dict[str, int]) -> int:
    """Give the value of an operand: a literal, a given number or the result of an earlier step."""
    return int(operand) if operand.isdigit() else numbers[operand]


def _write_step(step: re.Match[str], numbers: dict[str, int], result: int) -> str:
    """Write a step as GSM8K does: `3*4 = <<3*4=12>>12`, or `$3*4 = $<<3*4=12>>12` for money."""
    currency = step["currency"]
    calculation = f"{_value(step['left'], numbers)}{step['operator']}{_value(step['right'], numbers)}"
    return f"{currency}{calculation} = {currency}<<{calculation}={result}>>{result}"


def _calculate(left: int, operator: str, right: int) -> int | None:
    """Give the result of one step, or None when it is not a whole positive number within reach of a small model."""
    if operator == "/":
        exact = left % right == 0 and 1 < left // right <= LARGEST_QUOTIENT
        return left // right if exact else None
    if operator == "*" and min(left, right) > LARGEST_FACTOR:
        return None
    result = {"+": left + right, "-": left - right, "*": left * right}[operator]
    return result if 0 < result <= LARGEST_RESULT else None
