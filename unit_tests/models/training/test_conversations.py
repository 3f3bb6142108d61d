"""Training texts: prompts are what a server would build, completions end in a token that stops."""

import random

import pytest

from models.training.conversations import (
    SMALL_TALK,
    chat_text,
    draw_plain,
    draw_text,
    plain_text,
    think_about,
    tool_call_text,
)
from models.training.demo_tokenizer import END_OF_TEXT, END_OF_TURN, render_chat
from models.training.tool_chats import draw_tool_chat
from models.training.word_problems import Problem

PROBLEM = Problem("How many?", "There are 3*4 = <<3*4=12>>12.\nThen 12+5 = <<12+5=17>>17.\n#### 17", 17)


def test_a_chat_prompt_ends_where_the_answer_begins():
    text = chat_text([{"role": "user", "content": "Hi"}], "Hello!", None)
    assert text.prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert text.completion == "Hello!" + END_OF_TURN


def test_a_thought_comes_first_and_is_closed():
    text = chat_text([{"role": "user", "content": "Hi"}], "Hello!", "Hm.")
    assert text.prompt.endswith("<|im_start|>assistant\n<think>\n")
    assert text.completion == "Hm.\n</think>\n\nHello!" + END_OF_TURN


def test_a_turn_with_its_thought_reads_in_a_history_as_it_was_written():
    question = {"role": "user", "content": "Hi"}
    text = chat_text([question], "Hello!", "Hm.")
    answer = {"role": "assistant", "content": "Hello!", "reasoning_content": "Hm."}
    assert render_chat([question, answer], add_generation_prompt=False) == text.prompt + text.completion + "\n"


@pytest.mark.parametrize("thinks", [True, False])
def test_a_call_reads_in_a_history_as_it_was_written(thinks):
    chat = draw_tool_chat(random.Random(4))
    text = tool_call_text(chat, [], thinks)
    call = {"role": "assistant", "content": "", "tool_calls": [call.message for call in chat.calls]}
    call["reasoning_content"] = f"I need {chat.calls[0].name}." if thinks else ""
    messages = [{"role": "user", "content": chat.question}, call]
    history = render_chat(messages, add_generation_prompt=False, tools=chat.definitions)
    assert history == text.prompt + text.completion + "\n"


def test_thoughts_name_the_calculations_and_the_result():
    assert think_about(PROBLEM) == "First 3*4=12, then 12+5=17. So the answer is 17."


def test_completions_stop_once_and_at_their_end():
    rng = random.Random(1)
    for text in (draw_text(rng) for _ in range(300)):
        stop = END_OF_TEXT if text.prompt.startswith("Question:") else END_OF_TURN
        assert text.completion.endswith(stop)
        assert text.completion.count("<|") == 1


def test_every_kind_of_text_is_drawn():
    rng = random.Random(2)
    texts = [draw_text(rng) for _ in range(600)]
    prompts, completions = ("".join(part) for part in zip(*((t.prompt, t.completion) for t in texts), strict=True))
    assert all(
        part in prompts for part in ("<|im_start|>system", "Question: ", "Calculate", "<tools>", "<tool_response>")
    )
    assert all(part in completions for part in ("<tool_call>", "</think>", "The result is: ", "So the answer is"))
    assert any(f"user\n{question}<|im_end|>" in prompts for question in SMALL_TALK)


def test_a_plain_completion_answers_the_question_it_follows():
    text = draw_plain(random.Random(3))
    assert text.prompt.startswith("Question: ")
    assert text.prompt.endswith("\nAnswer:")
    assert text.completion.startswith(" ")
    assert plain_text(PROBLEM).prompt == "Question: How many?\nAnswer:"
