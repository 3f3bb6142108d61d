"""Text to ids and back, whole and in pieces."""

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import transformers

from models.training import demo_tokenizer
from server.errors import CheckpointError, ConfigError, InvalidRequest
from server.messages import SamplingParams
from server.tokenizer import Detokenizer, StopMatcher, Tokenizer, read_template

TEXT = "the quick naïve café 中文字符 😀😀 <a token> 12 + 30 = 42\n"

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _split(token_ids: list[int], rng: random.Random) -> list[list[int]]:
    pieces = []
    while token_ids:
        size = rng.randint(1, 4)
        pieces.append(token_ids[:size])
        token_ids = token_ids[size:]
    return pieces


def test_encoding_and_decoding_give_the_text_back(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_decoding_equals_the_tokenizers_library_on_random_ids(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(20)]
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == tokenizer._tokenizer.decode(ids, skip_special_tokens=skip)


def test_ids_without_a_token_decode_to_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.vocab_size + 50]) == ""


def test_special_tokens_in_text_become_their_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<|im_end|>") == [2]


def test_added_tokens_that_are_not_special_are_kept_when_special_ones_are_skipped(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("<think>a<|im_end|>")) == "<think>a"


def test_the_chat_template_gets_messages_and_further_variables(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    plain = "<|im_start|>user\nhi<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == plain
    assert tokenizer.apply_chat_template(messages) == plain + "<|im_start|>assistant\n"
    thinking = tokenizer.apply_chat_template(messages, variables={"enable_thinking": True})
    assert thinking == plain + "<|im_start|>assistant\n<think>\n"


@pytest.mark.parametrize(
    "messages", [[{"role": "a", "content": "b"}, {"role": "system", "content": "c"}], [{"role": 5}]]
)
def test_messages_the_template_refuses_are_an_invalid_request(tokenizer: Tokenizer, messages: list) -> None:
    with pytest.raises(InvalidRequest, match="chat template refused"):
        tokenizer.apply_chat_template(messages)


def test_the_template_may_come_from_the_tokenizer_config(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(checkpoint / "tokenizer.json", tmp_path)
    with pytest.raises(InvalidRequest, match="no chat template"):
        Tokenizer(tmp_path).apply_chat_template([{}])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages | tojson }}"}))
    assert Tokenizer(tmp_path).apply_chat_template([{"a": "é<"}]) == '[{"a": "é<"}]'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ('{"model":', "not valid JSON"),
        ("{}", "type None"),
        ("[" * 100_000, "not valid JSON"),
        ('{"model": {"type": "Unigram"}}', "BPE"),
        ('{"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}', "cannot be read by tokenizers"),
        (json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}, "decoder": BYTE_LEVEL}), "no tokens"),
    ],
)
def test_a_tokenizer_that_cannot_be_served_is_a_checkpoint_error(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token": {"x": 1}},
        {"eos_token": 5},
        {"chat_template": [{"name": "default"}]},
        {"chat_template": [{"name": "default", "template": 5}]},
        {"chat_template": 5},
    ],
)
def test_a_tokenizer_config_that_makes_no_sense_is_a_checkpoint_error(
    checkpoint: Path, tmp_path: Path, config: dict
) -> None:
    shutil.copy(checkpoint / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json has the {next(iter(config))}"):
        Tokenizer(tmp_path)


def test_a_template_of_the_settings_goes_before_the_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    text = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    (tmp_path / "own.jinja").write_text(text)
    assert read_template(str(tmp_path / "own.jinja")) == read_template(text) == text
    found = Tokenizer(checkpoint, text)
    assert found.apply_chat_template([{"role": "user", "content": "é"}]) == "<é>"
    assert found.description["chat_template"] == text
    with pytest.raises(ConfigError, match=r"--chat-template /nowhere/own\.jinja cannot be read: .*No such file"):
        read_template("/nowhere/own.jinja")
    with pytest.raises(CheckpointError, match="the chat template is broken at line 1"):
        Tokenizer(checkpoint, read_template("{% if %}"))


@pytest.mark.parametrize("template", [[{"name": "rag", "template": "x"}], ["x"], []])
def test_a_list_of_templates_without_a_default_is_no_template(checkpoint: Path, tmp_path: Path, template: list) -> None:
    shutil.copy(checkpoint / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(InvalidRequest, match="no chat template"):
        Tokenizer(tmp_path).apply_chat_template([{}])


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "tools"])
def test_a_variable_may_not_replace_a_field_of_the_request(tokenizer: Tokenizer, name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"sets {name}"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], variables={name: []})


def test_the_id_of_a_token_is_found_by_its_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.token_id("<think>")]) == "<think>"  # type: ignore[list-item]
    assert tokenizer.token_id("<tool_call>") is None


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"é": {"type": "string"}}}}}]
CALLS = [
    {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": {"é": "a\nb", "n": [1, None]}}},
    {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": {}}},
]
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes\n", "reasoning_content": "old"},
    {"role": "user", "content": "call"},
    {"role": "assistant", "content": "", "reasoning_content": "hm\n", "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "call_1", "content": "1 < 2"},
    {"role": "tool", "tool_call_id": "call_2", "content": "😀"},
    {"role": "assistant", "content": " so it is  "},
]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, transformers.PreTrainedTokenizerFast]:
    """Two readers of the demo's chat template."""
    folder = tmp_path_factory.mktemp("template")
    demo_tokenizer.save_tokenizer(demo_tokenizer.train_tokenizer([TEXT], 400), folder, 1024)
    return Tokenizer(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("length", range(2, len(CONVERSATION) + 1))
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize(
    "variables", [{}, {"enable_thinking": True}, {"enable_thinking": False, "documents": [{"a": 1}]}]
)
def test_conversations_with_tools_are_rendered_as_transformers_does(
    both, length: int, tools: Any, variables: Any
) -> None:
    tokenizer, reference = both
    messages = CONVERSATION[:length]
    for opens_turn in (True, False):
        expected = reference.apply_chat_template(
            messages, tools=tools, add_generation_prompt=opens_turn, tokenize=False, **variables
        )
        assert tokenizer.apply_chat_template(messages, opens_turn, variables, tools) == expected


@pytest.mark.parametrize("content", ["so it is", " so it is  ", "\n", "", "<think>\nhm", "so it is\n\n"])
@pytest.mark.parametrize("template", [None, "{% for m in messages %}<{{ m.content | trim }}>{% endfor %}"])
def test_a_last_message_goes_on_where_transformers_ends_it(both, content: str, template: str | None) -> None:
    tokenizer, reference = both
    messages = [*CONVERSATION[:-1], {"role": "assistant", "content": content}]
    expected = reference.apply_chat_template(
        messages, tools=TOOLS, continue_final_message=True, tokenize=False, chat_template=template
    )
    assert tokenizer.continue_final_message(messages, {}, TOOLS, template) == expected


def test_a_template_that_leaves_the_last_message_out_cannot_go_on_with_it(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="leaves out the last message"):
        tokenizer.continue_final_message([{"role": "assistant", "content": "x"}], template="nothing")


@pytest.mark.parametrize("template", ["{% if %}", "{{ x | nofilter }}", "{% for %}"])
def test_a_broken_template_of_a_request_is_an_invalid_request(tokenizer: Tokenizer, template: str) -> None:
    with pytest.raises(InvalidRequest, match="chat_template is broken at line 1"):
        tokenizer.apply_chat_template([], template=template)


def test_streamed_text_equals_decoding_all_tokens_for_any_pieces(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(100):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(30)] + tokenizer.encode(TEXT)
        detokenizer = Detokenizer(tokenizer, SamplingParams())
        deltas = [detokenizer.push(piece) for piece in _split(ids, rng)]
        assert "".join(deltas) + detokenizer.finish() == tokenizer.decode(ids)


def test_characters_are_never_split(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, SamplingParams())
    deltas = [detokenizer.push([token_id]) for token_id in tokenizer.encode("字符😀字")]
    assert len(deltas) > 4, "the characters must need several tokens each, or this proves nothing"
    assert "\ufffd" not in "".join(deltas)


def test_a_stop_token_gives_no_text_unless_it_is_asked_for(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the fox")
    silent = Detokenizer(tokenizer, SamplingParams())
    assert silent.push(ids, ends_with_stop_token=True) == tokenizer.decode(ids[:-1])
    assert silent.num_used == len(ids)
    assert Detokenizer(tokenizer, SamplingParams(include_stop_str_in_output=True)).push(ids, True) == "the fox"


@pytest.mark.parametrize("pieces", ["whole", "single"])
@pytest.mark.parametrize(
    ("stop", "text", "match"),
    [
        (("quick",), "the ", "quick"),
        (("k b", "own"), "the quic", "k b"),
        (("rown fox", "own"), "the quick br", "own"),  # the one that ends first
        (("own", "rown"), "the quick b", "rown"),  # of two that end together, the longest
        (("the",), "", "the"),
        (("absent",), "the quick brown fox", None),
        (("fox!",), "the quick brown fox", None),
    ],
)
def test_stop_strings_cut_at_the_first_match_for_any_pieces(
    tokenizer: Tokenizer, pieces: str, stop: tuple[str, ...], text: str, match: str | None
) -> None:
    ids = tokenizer.encode("the quick brown fox")
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=stop))
    parts = [detokenizer.push(piece) for piece in ([ids] if pieces == "whole" else [[i] for i in ids])]
    assert "".join(parts) + detokenizer.finish() == text
    assert detokenizer.stop_match == match
    used = tokenizer.decode(ids[: detokenizer.num_used])
    assert match is None or (match in used and match not in tokenizer.decode(ids[: detokenizer.num_used - 1]))


def test_the_stop_string_is_kept_when_asked_for(tokenizer: Tokenizer) -> None:
    sampling = SamplingParams(stop=("quick",), include_stop_str_in_output=True)
    assert Detokenizer(tokenizer, sampling).push(tokenizer.encode("the quick brown")) == "the quick"


def test_stop_strings_count_only_after_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("12 12 12 12")
    num_first = next(n for n in range(len(ids)) if "12" in tokenizer.decode(ids[:n]))
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=("12",), min_tokens=num_first))
    assert detokenizer.push(ids) == "12 "
    late = Detokenizer(tokenizer, SamplingParams(stop=("12",), min_tokens=len(ids)))
    assert late.push(ids) + late.finish() == "12 12 12 12"


def test_text_that_may_become_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=("fox jumps",)))
    assert detokenizer.push(tokenizer.encode("the fox")) == "the "
    assert detokenizer.push(tokenizer.encode(" runs")) == "fox runs"


def test_random_stop_strings_agree_with_a_search_over_the_whole_text() -> None:
    rng = random.Random(2)
    for _ in range(2000):
        text = "".join(rng.choice("ab") for _ in range(20))
        strings = ["".join(rng.choice("ab") for _ in range(rng.randint(1, 6))) for _ in range(rng.randint(1, 3))]
        found = [(text.find(s) + len(s), -len(s), s) for s in strings if s in text]
        matcher, output, match, rest = StopMatcher(strings), "", None, text
        while rest and match is None:
            size = rng.randint(1, 5)
            certain, match = matcher.push(rest[:size])
            output, rest = output + certain, rest[size:]
        if not found:
            assert match is None
            assert output + matcher.take_held() == text
        else:
            end, _, expected = min(found)
            assert (output, match) == (text[: end - len(expected)], expected)


def test_very_long_stop_strings_cost_linear_time() -> None:
    started = time.perf_counter()
    matcher = StopMatcher(["a" * 100_000 + "b", "a" * 50_000 + "c"])
    certain = "".join(matcher.push("a" * 10)[0] for _ in range(12_000))
    assert len(certain) == 20_000
    assert time.perf_counter() - started < 5  # a quadratic search takes minutes


def test_a_tokenizer_describes_itself_to_those_who_do_the_same(checkpoint: Path, tokenizer: Tokenizer) -> None:
    description = tokenizer.description
    assert description["chat_template"] == (checkpoint / "chat_template.jinja").read_text()
    assert tokenizer.token_id(description["eos_token"]) == 2
    assert str(checkpoint) not in str(description)
