"""Outputs that must match something, on the whole engine: they do, and drafts, company and overlap change no token."""

import itertools
import json
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from server.engine import Engine
from server.llm import LLM
from server.messages import Constraint, Failed, Generate, SamplingParams
from unit_tests.checkpoints import END_THINK, IM_END, THINK, make_checkpoint
from unit_tests.server.engines import (
    assert_nothing_left,
    generate,
    make_engine,
    make_prompts,
    run,
    tokens_of,
    watch_passes,
)

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", 'b"l\nue']}, "maxItems": 2},
        "more": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]},
    },
    "required": ["name", "age", "tags", "more"],
}
VALIDATOR = jsonschema_rs.Draft202012Validator(SCHEMA)
JSON, REGEX = Constraint("json_schema", json.dumps(SCHEMA)), Constraint("regex", r"[a-z]{2,5}@[a-z]{1,4}\.(com|org)")
CHOICE = Constraint("choice", '["yes", "no", "yes and no"]')
PROMPTS = [(prompt * 99)[: 70 + 4 * index] for index, prompt in enumerate(make_prompts(16, 60, 256, seed=7))]
FREE = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
GREEDY = SamplingParams(temperature=0, max_tokens=160, constraint=JSON)
SEEDED = SamplingParams(temperature=1, seed=5, max_tokens=160, constraint=JSON)
MIXED = [
    GREEDY,
    replace(FREE, temperature=1, seed=3),
    SEEDED,
    replace(SEEDED, constraint=REGEX, presence_penalty=1.0, top_k=20),
    replace(GREEDY, constraint=CHOICE, ignore_eos=True),
    FREE,
    replace(SEEDED, constraint=Constraint(JSON.kind, JSON.text, END_THINK), thinking_budget=4, think_end_id=END_THINK),
    replace(FREE, bad_words=((101,), (7, 9)), temperature=1.0, seed=9),
    replace(FREE, allowed_token_ids=tuple(range(97, 123)), temperature=1.0, seed=9, min_tokens=3),
    replace(SEEDED, constraint=CHOICE, logit_bias={ord("n"): 9.0}, min_tokens=30, logprobs=2),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("constrained"), num_layers=4, close_draft=True)


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> list[list[int]]:
    """The tokens of MIXED, each alone and without drafts."""
    engine = make_engine(checkpoint)
    return [generate(engine, [prompt], params)[0] for prompt, params in zip(PROMPTS, MIXED, strict=False)]


def text_of(tokens: list[int]) -> str:
    """The text of an output: ids below 256 are bytes, the other ones here say nothing."""
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


def check(params: SamplingParams, tokens: list[int]) -> None:
    """The output is what its settings demand."""
    constraint = params.constraint
    if constraint is None:
        return
    assert tokens[-1] == IM_END or tokens[-1] == 256
    if constraint.after_token_id is not None:
        tokens = tokens[tokens.index(constraint.after_token_id) + 1 :]
    text = text_of(tokens)
    if constraint.kind == "json_schema":
        assert VALIDATOR.is_valid(json.loads(text)), text
    elif constraint.kind == "regex":
        assert re.fullmatch(constraint.text, text)
    else:
        assert text in json.loads(constraint.text)


def test_every_output_is_what_was_asked_for(plain: list[list[int]]) -> None:
    for params, tokens in zip(MIXED, plain, strict=True):
        check(params, tokens)
    thought, bad, letters = plain[6], plain[7], plain[8]
    assert thought.index(END_THINK) <= 4
    assert 101 not in bad and not any(pair == (7, 9) for pair in itertools.pairwise(bad))
    assert all(97 <= token < 123 for token in letters) and len(letters) == 20


@pytest.mark.parametrize("mtp_step", [0, 1, 2, 3])
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_drafts_company_and_overlap_change_no_token(
    checkpoint: Path, plain: list[list[int]], mtp_step: int, overlap: str
) -> None:
    engine = make_engine(checkpoint, mtp_step=mtp_step, overlap=overlap, chunked_prefill_size=16)
    passes = watch_passes(engine)
    found = run(engine, PROMPTS[: len(MIXED)] * 2, MIXED * 2)
    assert tokens_of(found) == plain * 2
    joint = [batches for batches in passes if len(batches) > 1]
    has_masks = any(all(batch.has_matchers for batch in batches) for batches in joint)
    assert has_masks or engine.scheduler.limits.max_joint_tokens == 0
    for params, messages in zip(MIXED, found, strict=False):
        assert messages[-1].finish_reason == ("stop" if params.constraint else "length")
    if mtp_step:
        counters = engine.scheduler.counters
        assert counters.num_accepted > counters.num_verify_steps / 4


@pytest.mark.parametrize("mtp_step", [0, 3])
def test_preemption_and_reuse_of_prefixes_change_no_token(
    checkpoint: Path, plain: list[list[int]], mtp_step: int
) -> None:
    engine = make_engine(checkpoint, mtp_step=mtp_step, prefix_cache="on", checkpoint_interval=16, overlap="on")
    for index, (prompt, params) in enumerate(zip(PROMPTS[: len(MIXED)] * 2, MIXED * 2, strict=True)):
        engine.add(Generate(str(index), prompt, params))
    tokens: dict[str, list[int]] = {str(index): [] for index in range(2 * len(MIXED))}
    num_steps = 0
    while engine.has_work():
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
        num_steps += 1
        if num_steps % 4 == 0 and engine.scheduler.running:
            engine.scheduler._preempt(engine.scheduler.running[num_steps % len(engine.scheduler.running)])
    assert_nothing_left(engine)
    assert engine.scheduler.counters.num_preemptions > 5 and engine.scheduler.cache.counters.num_hits > 5
    assert list(tokens.values()) == plain * 2


@pytest.mark.parametrize("mtp_step", [1, 3])
def test_the_end_of_thinking_may_stand_anywhere_in_a_window(checkpoint: Path, mtp_step: int) -> None:
    """Every budget shifts it by one against the windows; the outputs are those without drafts."""
    constraint = Constraint("choice", '["left", "right", "straight on"]', END_THINK)
    params = [
        SamplingParams(
            temperature=1, seed=1, max_tokens=60, constraint=constraint, thinking_budget=budget, think_end_id=END_THINK
        )
        for budget in range(10)
    ]
    prompts = [[*PROMPTS[2], THINK]] * len(params)
    expected = generate(make_engine(checkpoint), prompts, params)
    engine = make_engine(checkpoint, mtp_step=mtp_step)
    assert generate(engine, prompts, params) == expected
    for budget, tokens in enumerate(expected):
        assert tokens.index(END_THINK) <= budget
        assert text_of(tokens[tokens.index(END_THINK) + 1 :]) in ("left", "right", "straight on")


def test_a_cut_output_says_so_and_is_a_prefix(checkpoint: Path, plain: list[list[int]]) -> None:
    for mtp_step in (0, 3):
        (messages,) = run(make_engine(checkpoint, mtp_step=mtp_step), PROMPTS[:1], replace(GREEDY, max_tokens=13))
        assert messages[-1].finish_reason == "length"
        assert tokens_of([messages])[0] == plain[0][:13]


def test_log_probabilities_stay_those_of_the_model(checkpoint: Path) -> None:
    params = replace(GREEDY, constraint=CHOICE, logprobs=3)
    for mtp_step in (0, 2):
        (messages,) = run(make_engine(checkpoint, mtp_step=mtp_step), PROMPTS[:1], params)
        entries = [entry for message in messages for entry in message.logprobs]
        assert len(entries) == len(tokens_of([messages])[0])
        assert any(entry.rank > 1 for entry in entries) and all(entry.logprob > -100 for entry in entries)


def add(engine: Engine, name: str, constraint: Constraint, **fields: Any) -> None:
    engine.add(Generate(name, PROMPTS[0], SamplingParams(max_tokens=20, constraint=constraint), **fields))


def finish(engine: Engine) -> list[Any]:
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    assert_nothing_left(engine)
    return outputs


def test_a_bad_grammar_fails_alone_and_before_any_token(checkpoint: Path) -> None:
    engine = make_engine(checkpoint, mtp_step=1)
    add(engine, "bad", Constraint("regex", "(", field="guided_regex"))
    add(engine, "good", CHOICE)
    outputs = finish(engine)
    assert [one for one in outputs if one.request_id == "bad"] == [
        Failed("bad", "InvalidRequest", "guided_regex is no regex that can be served: unclosed group", "guided_regex")
    ]
    assert outputs[-1].request_id == "good" and outputs[-1].finish_reason == "stop"


def test_a_request_is_aborted_or_late_while_its_grammar_is_compiled(checkpoint: Path) -> None:
    engine = make_engine(checkpoint)
    released = threading.Event()
    engine.grammars._compiler._pool.submit(released.wait, 60)
    add(engine, "gone", CHOICE)
    add(engine, "late", CHOICE, timeout=1e-9)
    assert engine.stats().num_waiting == 2
    engine.abort("gone")
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    released.set()
    assert [(one.request_id, one.error) for one in outputs] == [("late", "RequestTimeout")]
    assert_nothing_left(engine)


def test_a_grammar_that_cannot_go_on_ends_its_request(checkpoint: Path) -> None:
    engine = make_engine(checkpoint, mtp_step=2)
    dear = Constraint("regex", "((((a{1,100}){1,100}){1,100}){1,100}){1,100}", field="structured_outputs")
    engine.add(Generate("dear", PROMPTS[0], SamplingParams(logit_bias={97: 90.0}, constraint=dear)))
    engine.add(Generate("free", PROMPTS[1], FREE))
    outputs = finish(engine)
    (failed,) = [one for one in outputs if isinstance(one, Failed)]
    assert failed.request_id == "dear" and failed.param == "structured_outputs" and "too many" in failed.message
    assert sum(len(one.token_ids) for one in outputs if one.request_id == "free") == 20


@pytest.mark.parametrize("mtp_step", [0, 1, 3])
@pytest.mark.parametrize(("bias", "text"), [(59.5, "a" * 10 + "c"), (51.0, "a" * 11)])
def test_guesses_that_a_grammar_cannot_be_followed_through_change_nothing(
    checkpoint: Path, mtp_step: int, bias: float, text: str
) -> None:
    """The penalty leads the target from one letter to the other, the drafts guess the first one a few times too often;
    more than eleven of it cannot be followed."""
    dear = Constraint("regex", "((((a{1,100}){1,100}){1,100}){1,100}){1,100}c")
    biases = {ord("a"): 80.0, ord("c"): bias}
    params = SamplingParams(temperature=0, logit_bias=biases, frequency_penalty=2.0, constraint=dear)
    engine = make_engine(checkpoint, mtp_step=mtp_step, speculation="fixed")
    engine.add(Generate("dear", PROMPTS[0], params))
    outputs = finish(engine)
    tokens = [token for one in outputs if not isinstance(one, Failed) for token in one.token_ids]
    assert text_of(tokens) == text and isinstance(outputs[-1], Failed) != text.endswith("c")
    assert engine.scheduler.counters.num_accepted >= 5 or mtp_step == 0


@pytest.mark.parametrize("mtp_step", [0, 1, 2, 3])
def test_all_of_many_outputs_at_concurrency_32_parse(checkpoint: Path, mtp_step: int) -> None:
    prompts = make_prompts(96, 60, 256, seed=11)
    params = [
        replace(
            SEEDED,
            temperature=[0.0, 0.7, 1.3][index % 3],
            seed=index,
            constraint=[JSON, REGEX, CHOICE, Constraint(JSON.kind, JSON.text, END_THINK)][index % 4],
            thinking_budget=index % 9 if index % 4 == 3 else None,
            think_end_id=END_THINK,
            repetition_penalty=[1.0, 1.3][index % 2],
        )
        for index in range(len(prompts))
    ]
    engine = make_engine(checkpoint, mtp_step=mtp_step, max_running_requests=32, prefix_cache="on", overlap="on")
    found = run(engine, prompts, params)
    for one, messages in zip(params, found, strict=True):
        assert messages[-1].finish_reason == "stop"
        check(one, tokens_of([messages])[0])


@pytest.mark.slow
@pytest.mark.parametrize("mtp_step", [0, 3])
def test_grammars_and_structural_tags_are_followed(checkpoint: Path, mtp_step: int) -> None:
    tag = {"type": "tag", "begin": "<f>", "content": {"type": "regex", "pattern": "[ab]{1,3}"}, "end": "</f>"}
    text = json.dumps({"type": "structural_tag", "format": tag})
    grammars = [Constraint("grammar", 'root ::= "a" root "b" | "c"'), Constraint("structural_tag", text)]
    params = [replace(SEEDED, constraint=grammars[index % 2], seed=index) for index in range(8)]
    outputs = generate(make_engine(checkpoint, mtp_step=mtp_step), PROMPTS[:8], params)
    for tokens in outputs[::2]:
        depth, rest = divmod(len(text_of(tokens)), 2)
        assert text_of(tokens) == "a" * depth + "c" + "b" * depth and rest == 1
    for tokens in outputs[1::2]:
        assert re.fullmatch(r"<f>[ab]{1,3}</f>", text_of(tokens))
    if mtp_step:
        assert outputs == generate(make_engine(checkpoint), PROMPTS[:8], params)


def test_tokens_of_several_bytes_change_nothing() -> None:
    """The bundled checkpoint has merges, so a grammar may be followed by many ways of cutting the same text."""
    params = [replace(GREEDY, max_tokens=60), replace(SEEDED, max_tokens=60), replace(SEEDED, constraint=REGEX)]
    found = []
    for mtp_step in (0, 3):
        llm = LLM(mtp_step=mtp_step, dtype="float64", max_model_len=128, num_threads=1, speculation="fixed")
        found.append(llm.generate(["The apples:"] * 3, params))
    assert [output.token_ids for output in found[0]] == [output.token_ids for output in found[1]]
    for output, one in zip(found[1], params, strict=True):
        if output.finish_reason == "stop":
            text = output.text
            assert VALIDATOR.is_valid(json.loads(text)) if one.constraint == JSON else re.fullmatch(REGEX.text, text)
    assert any(output.finish_reason == "stop" for output in found[1])
    assert found[1][0].num_accepted > found[1][0].num_proposed / 4
