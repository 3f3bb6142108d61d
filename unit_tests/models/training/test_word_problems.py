"""Word problems: every printed step is right, the last line is the answer, the held-out split is disjoint."""

import random
import re

import pytest

from models.training.stories import DRILLS, STORIES
from models.training.word_problems import draw_drill, draw_problem, is_held_out, read_result

STEP = re.compile(r"(\d+)([-+*/])(\d+) = \$?<<\1\2\3=(\d+)>>\4\b")


def calculate(left: int, operator: str, right: int) -> float:
    return {"+": left + right, "-": left - right, "*": left * right, "/": left / right}[operator]


@pytest.mark.parametrize("story", [*STORIES, *DRILLS], ids=lambda story: story.question[:30])
def test_every_step_of_every_story_is_right_and_the_last_one_is_the_answer(story):
    rng = random.Random(3)
    for _ in range(20):
        problem = draw_problem(rng, stories=(story,))
        *lines, last = problem.answer.split("\n")
        results = []
        for line in lines:
            left, operator, right, result = STEP.search(line).groups()
            assert calculate(int(left), operator, int(right)) == int(result) > 0
            results.append(int(result))
        assert len(lines) == len(story.solution)
        assert last == f"#### {results[-1]}"
        assert problem.result == results[-1]
        assert not re.search(r"[{}\[\]|\\]", problem.question + problem.answer), "a placeholder was left"


def test_the_given_numbers_of_a_solution_are_in_its_question():
    rng = random.Random(4)
    for _ in range(200):
        problem = draw_problem(rng)
        known = {*re.findall(r"\d+", problem.question), "2", "4"}  # halves and legs
        for left, _, right, result in STEP.findall(problem.answer):
            assert {left, right} <= known
            known.add(result)


def test_the_same_seed_draws_the_same_problems():
    first, second = ([draw_problem(random.Random(5)) for _ in range(3)] for _ in range(2))
    assert first == second


def test_training_and_held_out_problems_are_disjoint():
    rng = random.Random(6)
    assert not any(is_held_out(draw_problem(rng).question) for _ in range(200))
    assert not any(is_held_out(draw_drill(rng).question) for _ in range(50))
    assert all(is_held_out(draw_problem(rng, held_out=True).question) for _ in range(50))


def test_the_last_marked_number_of_an_answer_is_read():
    assert read_result("Tom has 3*4 = <<3*4=12>>12 apples.\n#### 12") == 12
    assert read_result("#### 1\n#### -7") == -7
    assert read_result("There are 12 apples.") is None
