"""Chat messages and chunks made of deltas, without a server around them."""

import random
from dataclasses import replace
from typing import Any

import pytest

from server.api.chat_format import ChatFormat, FirstCall, MessageReader, MessageRules, write_message
from server.api.generation import Choice, Delta, Job
from server.api.message_parser import ContentPiece, ReasoningPiece, ToolArguments, ToolCallStart
from server.api.terms import Terms
from server.api.tools import AUTO, Tools
from server.messages import SamplingParams, TokenLogprobs
from server.tokenizer import Tokenizer

CALL = "<tool_call>\n<function=f>\n<parameter=x>\na\n</parameter>\n</function>\n</tool_call>"
TOOLS = Tools([], {"f": {}}, frozenset(), AUTO, None, True)
JOB = Job(prompts=[[1]], sampling=SamplingParams(), n=1, terms=Terms(), stream=True)


def delta(text: str, finish_reason: str | None = None, index: int = 0, **fields: Any) -> Delta:
    """One of a choice."""
    return Delta(index, text, fields.get("token_ids", []), [], finish_reason, None)


def test_a_message_has_what_the_pieces_say_and_null_for_the_rest() -> None:
    pieces = [
        ReasoningPiece("h"),
        ReasoningPiece("m"),
        ContentPiece("ye"),
        ToolCallStart(0, "call_1", "f"),
        ToolArguments(0, '{"x": '),
        ToolArguments(0, "1}"),
        ToolCallStart(1, "call_2", "g"),
        ContentPiece("s"),
    ]
    first = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    second = {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": ""}}
    assert write_message(pieces) == {
        "role": "assistant",
        "content": "yes",
        "refusal": None,
        "annotations": [],
        "reasoning": "hm",
        "reasoning_content": "hm",
        "tool_calls": [first, second],
    }
    assert write_message([ReasoningPiece("hm")])["content"] is None
    assert write_message([ToolCallStart(0, "call_1", "f")])["content"] is None
    assert write_message([])["content"] == ""


@pytest.mark.parametrize(
    ("token_ids", "finish_reason", "stop_reason", "told"),
    [
        ([70, 71, 2], "stop", None, [[70, 71], [2]]),
        ([70, 71, 3], "stop", 3, [[70, 71], [3]]),
        ([2], "stop", None, [[2]]),
        ([70, 71, 72], "stop", "H", [[70, 71, 72]]),
        ([70, 71], "length", None, [[70, 71]]),
    ],
)
def test_a_chunk_of_text_has_no_scores_of_a_token_that_ends_the_answer(
    tokenizer: Tokenizer, token_ids: list[int], finish_reason: str, stop_reason: Any, told: list[list[int]]
) -> None:
    job = replace(JOB, sampling=SamplingParams(logprobs=0), tokens_as_ids=True)
    scores = [TokenLogprobs(-0.5, [], []) for _ in token_ids]
    last = Delta(0, "FG"[: len(token_ids) - 1], token_ids, scores, finish_reason, stop_reason)
    _, *chunks = ChatFormat(tokenizer, job, MessageRules()).chunks(last)
    entries = [[int(entry["token"].split(":")[1]) for entry in chunk["logprobs"]["content"]] for chunk in chunks]
    assert entries == told
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(told) - 1) + [finish_reason]
    assert all(chunk["delta"] == {} for chunk in chunks[1:])


def test_chunks_have_one_piece_each_and_the_last_one_the_end(tokenizer: Tokenizer) -> None:
    form = ChatFormat(tokenizer, JOB, MessageRules(TOOLS, starts_thinking=True))
    chunks = [form.chunks(delta("hm</think>\n\nyes")), form.chunks(delta("\n")), form.chunks(delta(CALL, "stop"))]
    deltas = [[chunk["delta"] for chunk in some] for some in chunks]
    assert deltas[0] == [
        {"role": "assistant", "content": ""},
        {"reasoning": "hm", "reasoning_content": "hm"},
        {"content": "yes"},
    ]
    assert deltas[1] == []
    start, arguments = (entry["tool_calls"][0] for entry in deltas[2])
    assert {**start, "id": ""} == {"index": 0, "id": "", "type": "function", "function": {"name": "f", "arguments": ""}}
    assert arguments == {"index": 0, "function": {"arguments": '{"x": "a"}'}}
    assert [chunk["finish_reason"] for some in chunks for chunk in some] == [None] * 4 + ["tool_calls"]
    assert "stop_reason" in chunks[2][-1] and "stop_reason" not in chunks[2][0]


def test_an_end_without_text_has_a_chunk_of_its_own(tokenizer: Tokenizer) -> None:
    form = ChatFormat(tokenizer, JOB, MessageRules())
    assert [chunk["delta"] for chunk in form.chunks(delta("", "stop"))] == [{"role": "assistant", "content": ""}, {}]
    assert form.empty_chunk(3) == {"index": 3, "delta": {}, "logprobs": None, "finish_reason": None}


def test_choices_are_told_apart(tokenizer: Tokenizer) -> None:
    form = ChatFormat(tokenizer, JOB, MessageRules(starts_thinking=True))
    form.chunks(delta("hm</think>"))
    assert form.chunks(delta("still", index=1))[-1]["delta"] == {"reasoning": "still", "reasoning_content": "still"}
    assert form.chunks(delta("yes"))[-1] == {
        "index": 0,
        "delta": {"content": "yes"},
        "logprobs": None,
        "finish_reason": None,
    }


@pytest.mark.parametrize(("reason", "told"), [("stop", "tool_calls"), ("length", "length"), ("abort", "abort")])
def test_only_a_message_that_ended_by_itself_ends_with_tool_calls(tokenizer: Tokenizer, reason: str, told: str) -> None:
    reader = MessageReader(tokenizer, MessageRules(TOOLS))
    reader.take(delta(CALL, reason))
    assert reader.finish_reason(reason) == told
    without = MessageReader(tokenizer, MessageRules(TOOLS))
    without.take(delta("no call", reason))
    assert without.finish_reason(reason) == reason


def test_a_beginning_is_read_like_the_rest(tokenizer: Tokenizer) -> None:
    reader = MessageReader(tokenizer, MessageRules(TOOLS, starts_thinking=True, beginning="<think>I "))
    assert reader.take(delta("look")) == [ReasoningPiece("I look")]
    assert reader.take(delta(".</think>Yes", "stop")) == [ReasoningPiece("."), ContentPiece("Yes")]


def test_reasoning_tokens_end_where_the_reasoning_does_even_if_its_text_is_held_back(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_id("</think>")
    reader = MessageReader(tokenizer, MessageRules(starts_thinking=True))
    reader.take(delta("", token_ids=[5, 6]))
    reader.take(delta("", token_ids=[7, end, 8]))
    assert reader.num_reasoning_tokens == 3
    reader.take(delta("abc</think>d", "stop", token_ids=[9, 2]))
    assert reader.num_reasoning_tokens == 3


def test_a_whole_message_is_what_its_chunks_say(tokenizer: Tokenizer) -> None:
    choice = Choice(0, None, None)  # type: ignore[arg-type]
    text, rng = f"hm\n</think>\n\nyes\n\n{CALL}\n{CALL}", random.Random(0)
    for _ in range(50):
        cuts = sorted(rng.randrange(len(text)) for _ in range(8))
        parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        deltas = [delta(part) for part in parts[:-1]] + [delta(parts[-1], "stop")]
        rules = MessageRules(TOOLS, starts_thinking=True)
        whole = ChatFormat(tokenizer, JOB, rules).choice(choice, deltas)
        streaming = ChatFormat(tokenizer, JOB, rules)
        chunks = [chunk["delta"] for each in deltas for chunk in streaming.chunks(each)]
        assert whole["message"]["reasoning"] == "".join(chunk.get("reasoning", "") for chunk in chunks) == "hm\n"
        assert whole["message"]["content"] == "".join(chunk.get("content", "") for chunk in chunks) == "yes"
        calls = [call for chunk in chunks for call in chunk.get("tool_calls", ())]
        for index, call in enumerate(whole["message"]["tool_calls"]):
            arguments = "".join(part["function"]["arguments"] for part in calls if part["index"] == index)
            assert call["function"]["arguments"] == arguments == '{"x": "a"}'


def test_the_older_form_of_a_call_has_no_id(tokenizer: Tokenizer) -> None:
    tools = Tools([], {"f": {}}, frozenset(), AUTO, None, False, is_older=True)
    form = ChatFormat(tokenizer, JOB, MessageRules(tools))
    chunks = form.chunks(delta(CALL, "stop"))
    calls = [chunk["delta"].get("function_call") for chunk in chunks]
    assert calls[:2] == [None, {"name": "f", "arguments": ""}]
    assert "".join(call["arguments"] for call in calls[1:]) == '{"x": "a"}'
    assert chunks[-1]["finish_reason"] == "function_call"
    pieces = [ToolCallStart(0, "call_1", "f"), ToolArguments(0, "{}")]
    assert write_message(pieces, is_older=True)["function_call"] == {"name": "f", "arguments": "{}"}


@pytest.mark.parametrize("min_tokens", [0, 4])
def test_the_first_call_ends_at_its_last_token_or_at_the_minimum(min_tokens: int) -> None:
    tools = Tools([], {"f": {}}, frozenset(), AUTO, None, False)
    call = FirstCall(MessageRules(tools, starts_thinking=True), min_tokens)
    texts = ["</tool_call></think>" + CALL[:20], CALL[20:-3], CALL[-3:], " and more"]
    assert [call.ends_with(text) for text in texts] == [False, False, min_tokens == 0, True]
