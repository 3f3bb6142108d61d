"""The demo's tokenizer and chat template: any text survives, digits stand alone, roles are checked."""

import json
import random

import jinja2
import pytest

from models.training.conversations import draw_text
from models.training.demo_tokenizer import CHAT_TEMPLATE, find_stop_ids, render_chat, save_tokenizer, train_tokenizer

VOCAB_SIZE = 400


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(0)
    return train_tokenizer((text.prompt + text.completion for text in (draw_text(rng) for _ in range(200))), VOCAB_SIZE)


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    "text", ["Tom has 12 apples.\n#### 12", "naïve 漢字 🙂 x\t \r\n\n y", "<think>\n\n</think>", " a  b "]
)
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_text_is_composed_before_it_is_encoded(tokenizer):
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids


def test_every_digit_is_a_token(tokenizer):
    assert tokenizer.encode("1234*56").tokens == ["1", "2", "3", "4", "*", "5", "6"]


def test_added_tokens_are_last_single_and_only_the_turn_tokens_are_special(tokenizer):
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    markup = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *markup]
    added = list(range(VOCAB_SIZE - len(tokens), VOCAB_SIZE))
    assert tokenizer.encode("".join(tokens)).ids == added
    assert tokenizer.decode(added) == "".join(markup)
    assert find_stop_ids(tokenizer) == (added[2], added[0])


def test_the_saved_files_name_the_end_of_a_turn_as_the_end(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path, 4096)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (settings["eos_token"], settings["pad_token"]) == ("<|im_end|>", "<|endoftext|>")
    assert (tmp_path / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_transformers_reads_the_saved_tokenizer_and_template(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_tokenizer(tokenizer, tmp_path, 4096)
    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": [1, "<é>"]}}}
    messages = [
        {"role": "system", "content": "Be kind."},
        user("Tom has 3 apples."),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
    ]
    rendered = loaded.apply_chat_template(messages, tools=[TOOL], tokenize=False, add_generation_prompt=True)
    assert rendered == render_chat(messages, tools=[TOOL])
    assert loaded(rendered)["input_ids"] == tokenizer.encode(rendered).ids


def test_the_prompt_of_an_answer_closes_the_thinking_unless_it_is_asked_for():
    closed = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert render_chat([user("a")]).endswith(closed)
    assert render_chat([user("a")], enable_thinking=False).endswith(closed)
    assert render_chat([user("a")], enable_thinking=True).endswith("<|im_start|>assistant\n<think>\n")
    assert render_chat([user("a")], add_generation_prompt=False) == "<|im_start|>user\na<|im_end|>\n"


@pytest.mark.parametrize("key", ["content", "reasoning_content"])
def test_text_parts_are_joined_and_thoughts_dropped_once_the_user_has_gone_on(key):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    text = {"content": "<think>\nx\n</think>\n\nyes"} if key == "content" else {"content": "yes", key: "x"}
    messages = [user(parts), {"role": "assistant", **text}]
    question, answer = "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n", "yes<|im_end|>\n"
    assert render_chat(messages, add_generation_prompt=False) == question + "<think>\nx\n</think>\n\n" + answer
    later = render_chat([*messages, user("c")], add_generation_prompt=False)
    assert later == question + answer + "<|im_start|>user\nc<|im_end|>\n"


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def test_tools_stand_before_the_system_prompt_in_one_turn():
    text = render_chat([{"role": "system", "content": "Be kind."}, user("a")], tools=[TOOL])
    assert text.startswith(f"<|im_start|>system\n# Tools\n\n<tools>\n{json.dumps(TOOL)}\n</tools>\n\n")
    assert "\n</function>\n</tool_call>\n\nBe kind.<|im_end|>\n<|im_start|>user\na<|im_end|>\n" in text
    assert text.count("<|im_start|>system") == 1


def test_calls_and_the_answers_of_tools_are_marked_up():
    calls = [{"function": {"name": "add", "arguments": {"a": 1, "b": "x<y"}}}, {"name": "now", "arguments": {}}]
    messages = [
        user("q"),
        {"role": "assistant", "content": "Well.", "tool_calls": calls},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "noon"},
    ]
    text = render_chat(messages, add_generation_prompt=False, tools=[TOOL])
    expected = (
        "Well.\n<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\nx<y\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call><|im_end|>\n<|im_start|>user\n"
        "<tool_response>\n2\n</tool_response>\n<tool_response>\nnoon\n</tool_response><|im_end|>\n"
    )
    assert text.endswith(expected)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "robot", "content": "a"}],
        [user("a"), {"role": "system", "content": "b"}],
        [user([{"type": "image_url", "image_url": "x"}])],
    ],
    ids=["unknown role", "late system message", "an image"],
)
def test_what_the_template_cannot_render_is_refused(messages):
    with pytest.raises(jinja2.TemplateError):
        render_chat(messages)
