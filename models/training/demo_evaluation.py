"""Measures a target and its MTP head on word problems and tool calls: greedy answers, and the drafts that greedy
decoding accepts.

Decodes by whole-sequence forwards, without caches: short, and independent of the server. A guess of the answer makes
this fast and changes nothing: only tokens that the model itself chooses are kept.
"""

import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from models.qwen3_5.model import Qwen35
from models.qwen3_5_mtp.model import Qwen35MTP
from models.training.conversations import Text, chat_text, plain_text, think_about, tool_call_text
from models.training.demo_tokenizer import find_stop_ids
from models.training.tool_chats import draw_tool_chat
from models.training.word_problems import Problem, draw_problem, read_result

MAX_NEW_TOKENS = 200
BATCH_SIZE = 50


@dataclass(frozen=True)
class Question:
    """A text whose completion is asked for, and what tells a right one (special tokens are not part of it)."""

    text: Text
    is_right: Callable[[str], bool]


@dataclass(frozen=True)
class Score:
    """What an evaluation found.

    Attributes:
        num_problems: questions that were asked.
        num_solved: answers that are right and ended by themselves.
        num_drafts: drafts proposed with one draft per step (mtp_step 1).
        num_accepted: drafts among them that were the token decoded next.
    """

    num_problems: int
    num_solved: int
    num_drafts: int
    num_accepted: int

    @property
    def solved(self) -> float:
        """Share of the problems that were solved."""
        return self.num_solved / self.num_problems

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were accepted."""
        return self.num_accepted / max(1, self.num_drafts)

    def __str__(self) -> str:
        return (
            f"solved {self.num_solved} of {self.num_problems} ({self.solved:.1%}), "
            f"accepted {self.num_accepted} of {self.num_drafts} drafts ({self.acceptance:.1%})"
        )


def draw_held_out(seed: int, num_problems: int, min_steps: int = 1) -> list[Problem]:
    """Draw problems of at least so many steps that training never sees."""
    rng = random.Random(seed)
    problems: list[Problem] = []
    while len(problems) < num_problems:
        problem = draw_problem(rng, held_out=True)
        if problem.num_steps >= min_steps:
            problems.append(problem)
    return problems


def ask_in_chat(problem: Problem, thinks: bool = False) -> Question:
    """Give a problem as a chat."""
    messages = [{"role": "user", "content": problem.question}]
    return _ask(problem, chat_text(messages, problem.answer, think_about(problem) if thinks else None))


def ask_plainly(problem: Problem) -> Question:
    """Give a problem as a plain completion."""
    return _ask(problem, plain_text(problem))


def draw_tool_questions(seed: int, count: int) -> list[Question]:
    """Draw chats that need a tool; right is the very call that was asked for. Training may have seen some of them."""
    rng = random.Random(seed)
    texts = [(chat, tool_call_text(chat, [], thinks=False)) for chat in (draw_tool_chat(rng) for _ in range(count))]
    return [Question(text, partial(operator.eq, chat.markup)) for chat, text in texts]


@torch.no_grad()
def evaluate(target: Qwen35, draft: Qwen35MTP, tokenizer: Tokenizer, questions: Sequence[Question]) -> Score:
    """Decode an answer to every question greedily and count right answers and accepted drafts."""
    prompts = [tokenizer.encode(question.text.prompt).ids for question in questions]
    guesses = [tokenizer.encode(question.text.completion).ids[:-1] for question in questions]
    stop_ids = set(find_stop_ids(tokenizer))
    answers = decode_greedily(target, prompts, guesses, stop_ids)
    num_solved, walks = 0, []
    for question, prompt, answer in zip(questions, prompts, answers, strict=True):
        has_stopped = bool(answer) and answer[-1] in stop_ids
        num_solved += has_stopped and question.is_right(tokenizer.decode(answer))
        walks.append(walk_drafts(draft_tokens(target, draft, prompt + answer), prompt, answer))
    num_drafts, num_accepted = (sum(counts) for counts in zip(*walks, strict=True))
    return Score(len(questions), num_solved, num_drafts, num_accepted)


@torch.no_grad()
def decode_greedily(
    target: Qwen35, prompts: list[list[int]], guesses: list[list[int]], stop_ids: set[int]
) -> list[list[int]]:
    """Give the greedy continuation of every prompt, its stop token included, at most `MAX_NEW_TOKENS` tokens.

    Every forward reads the tokens found so far and the rest of the guess, keeps what the model itself would have
    written up to the first difference, and puts the model's token there.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    active = sorted(range(len(prompts)), key=lambda index: len(prompts[index]) + len(guesses[index]))
    while active:
        for start in range(0, len(active), BATCH_SIZE):
            group = active[start : start + BATCH_SIZE]
            continuations = [answers[index] + guesses[index][len(answers[index]) :] for index in group]
            chosen = _choose_tokens(target, [prompts[index] for index in group], continuations)
            for index, guess, tokens in zip(group, continuations, chosen, strict=True):
                answers[index] = _keep_agreed(guess, tokens, stop_ids)
        active = [index for index in active if not _is_finished(answers[index], stop_ids)]
    return answers


@torch.no_grad()
def draft_tokens(target: Qwen35, draft: Qwen35MTP, token_ids: list[int]) -> list[int]:
    """Give the argmax of every draft row: entry p is the draft of token p + 2, made from the tokens up to p + 1."""
    row = torch.tensor([token_ids])
    hidden = target.forward_sequence(row[:, :-1])
    return target.compute_logits(draft.forward_sequence(row[:, 1:], hidden))[0].argmax(-1).tolist()


def walk_drafts(drafts: list[int], prompt: list[int], answer: list[int]) -> tuple[int, int]:
    """Count the drafts that decoding with one draft per step proposes and accepts: an accepted draft skips a step."""
    num_drafts = num_accepted = 0
    newest = len(prompt)  # the first answer token comes from the prefill
    token_ids = prompt + answer
    while newest + 1 < len(token_ids):
        is_accepted = drafts[newest - 1] == token_ids[newest + 1]
        num_drafts += 1
        num_accepted += is_accepted
        newest += 1 + is_accepted
    return num_drafts, num_accepted


def _ask(problem: Problem, text: Text) -> Question:
    """Give a question whose right answers end in the problem's result."""
    return Question(text, lambda answer: read_result(answer) == problem.result)


def _choose_tokens(target: Qwen35, prompts: list[list[int]], continuations: list[list[int]]) -> list[list[int]]:
    """Give the model's greedy token at every place of every continuation and at the one after it."""
    rows = [torch.tensor(prompt + tokens) for prompt, tokens in zip(prompts, continuations, strict=True)]
    hidden: Tensor = target.forward_sequence(nn.utils.rnn.pad_sequence(rows, batch_first=True))
    return [
        target.compute_logits(hidden[row, len(prompt) - 1 : len(prompt) + len(tokens)]).argmax(-1).tolist()
        for row, (prompt, tokens) in enumerate(zip(prompts, continuations, strict=True))
    ]


def _keep_agreed(guess: list[int], chosen: list[int], stop_ids: set[int]) -> list[int]:
    """Keep the chosen tokens up to and including the first that differs from the guess, or that stops."""
    kept: list[int] = []
    for position, token_id in enumerate(chosen):
        kept.append(token_id)
        if token_id in stop_ids or guess[position : position + 1] != [token_id]:
            break
    return kept


def _is_finished(answer: list[int], stop_ids: set[int]) -> bool:
    """Tell whether an answer has stopped or is as long as answers get."""
    return answer[-1] in stop_ids or len(answer) >= MAX_NEW_TOKENS
