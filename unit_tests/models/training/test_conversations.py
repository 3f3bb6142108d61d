"""Training texts: prompts are what a server would build, completions end in a token that stops."""

import random

from models.training.conversations import SMALL_TALK, chat_prompt, draw_plain, draw_text
from models.training.demo_tokenizer import END_OF_TEXT, END_OF_TURN


def test_a_chat_prompt_ends_where_the_answer_begins():
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert chat_prompt("Hi") == expected


def test_completions_stop_once_and_at_their_end():
    rng = random.Random(1)
    for text in (draw_text(rng) for _ in range(300)):
        stop = END_OF_TEXT if text.prompt.startswith("Question:") else END_OF_TURN
        assert text.completion.endswith(stop)
        assert text.completion.count("<|") == 1


def test_every_kind_of_text_is_drawn():
    rng = random.Random(2)
    prompts = "".join(draw_text(rng).prompt for _ in range(600))
    assert all(part in prompts for part in ("<|im_start|>system", "Question: ", "Calculate"))
    assert any(f"user\n{question}<|im_end|>" in prompts for question in SMALL_TALK)


def test_a_plain_completion_answers_the_question_it_follows():
    text = draw_plain(random.Random(3))
    assert text.prompt.startswith("Question: ")
    assert text.prompt.endswith("\nAnswer:")
    assert text.completion.startswith(" ")
