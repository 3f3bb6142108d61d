"""The story templates: every number is given and used, every line holds one step."""

import re

import pytest

from models.training.stories import DRILLS, RANGES, STORIES


@pytest.mark.parametrize("story", [*STORIES, *DRILLS], ids=lambda story: story.question[:30])
def test_a_story_gives_and_uses_every_number_it_draws(story):
    letters = set("abcd"[: len(story.numbers.split())])
    steps = [re.findall(r"\[(\w+)[-+*/](\w+)\]", line) for line in story.solution]
    assert all(name in RANGES for name in story.numbers.split())
    assert set(re.findall(r"\{([a-d])\}", story.question)) == letters
    assert all(len(step) == 1 for step in steps), "one step a line"
    used = {operand for step in steps for operand in step[0] if operand.isalpha()}
    assert letters | set("xyz"[: len(steps) - 1]) == used


def test_there_are_stories_of_one_two_and_three_steps_with_every_operation():
    assert {len(story.solution) for story in STORIES} == {1, 2, 3}
    operations = {
        operator for story in STORIES for line in story.solution for operator in re.findall(r"\w([-+*/])\w", line)
    }
    assert operations == set("+-*/")


def test_no_two_stories_ask_the_same_question():
    assert len({story.question for story in (*STORIES, *DRILLS)}) == len(STORIES) + len(DRILLS)
