"""Measures a target and its MTP head on word problems: greedy answers and the drafts that greedy decoding accepts.

Decodes by whole-sequence forwards, without caches: short, and independent of the server. A guess of the answer makes
this fast and changes nothing: only tokens that the model itself chooses are kept.
"""

import random
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from models.qwen3_5.model import Qwen35
from models.qwen3_5_mtp.model import Qwen35MTP
from models.training.conversations import chat_prompt, plain_prompt
from models.training.demo_tokenizer import find_stop_ids
from models.training.word_problems import Problem, draw_problem, read_result

MAX_NEW_TOKENS = 120
BATCH_SIZE = 50


@dataclass(frozen=True)
class Score:
    """What an evaluation found.

    Attributes:
        num_problems: how many were asked.
        num_solved: answers whose last `####` number is right and that ended by themselves.
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


def draw_held_out(seed: int, num_problems: int) -> list[Problem]:
    """Draw problems that training never sees."""
    rng = random.Random(seed)
    return [draw_problem(rng, held_out=True) for _ in range(num_problems)]


@torch.no_grad()
def evaluate(
    target: Qwen35, draft: Qwen35MTP, tokenizer: Tokenizer, problems: list[Problem], is_chat: bool = True
) -> Score:
    """Decode an answer to every problem greedily and count right answers and accepted drafts."""
    render, space = (chat_prompt, "") if is_chat else (plain_prompt, " ")
    prompts = [tokenizer.encode(render(problem.question)).ids for problem in problems]
    guesses = [tokenizer.encode(space + problem.answer).ids for problem in problems]
    stop_ids = set(find_stop_ids(tokenizer))
    answers = decode_greedily(target, prompts, guesses, stop_ids)
    num_solved, walks = 0, []
    for problem, prompt, answer in zip(problems, prompts, answers, strict=True):
        has_stopped = bool(answer) and answer[-1] in stop_ids
        num_solved += has_stopped and read_result(tokenizer.decode(answer)) == problem.result
        walks.append(walk_drafts(draft_tokens(target, draft, prompt + answer), prompt, answer))
    num_drafts, num_accepted = (sum(counts) for counts in zip(*walks, strict=True))
    return Score(len(problems), num_solved, num_drafts, num_accepted)


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
