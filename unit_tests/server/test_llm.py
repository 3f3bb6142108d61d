import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from server.errors import InvalidRequest, ModelFailure, RequestTimeout
from server.llm import LLM, SamplingParams
from server.messages import FINISH_ABORT, FINISH_LENGTH, FINISH_STOP, Failed, Generate, TokenOutput
from server.tokenizer import Tokenizer
from unit_tests.checkpoints import make_checkpoint

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("llm"), num_layers=4, close_draft=True)
    settings = {"mtp_step": 2, "speculation": "fixed", "dtype": "float64", "max_model_len": 256, "num_threads": 1}
    return LLM(model=str(checkpoint), **settings)


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same shape."""
    return make_checkpoint(tmp_path_factory.mktemp("other"), num_layers=4, close_draft=True, seed=1)


def is_idle(llm: LLM) -> bool:
    """Nothing runs but what is on its way or left to tidy up, and that has nothing to say."""
    return [llm.engine.step() for _ in range(3)] == [[]] * 3 and not llm.engine.has_work()


def test_text_and_token_prompts_give_the_same(llm: LLM) -> None:
    text = "How many apples?"
    from_text, from_ids = llm.generate([text], GREEDY) + llm.generate([llm.tokenizer.encode(text)], GREEDY)
    assert from_text == from_ids
    assert from_text.finish_reason == "length" and len(from_text.token_ids) == 24
    assert from_text.text == llm.tokenizer.decode(from_text.token_ids)
    assert 1.0 <= from_text.accept_length == 23 / from_text.num_steps <= 3.0


def test_streamed_deltas_add_up_to_the_whole(llm: LLM) -> None:
    whole = llm.generate(["abc"], GREEDY)[0]
    deltas = list(llm.stream("abc", GREEDY))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
    assert [delta.finish_reason for delta in deltas][-2:] == [None, "length"]


def test_prompts_are_scored_with_and_without_an_output(llm: LLM) -> None:
    prompt = llm.tokenizer.encode("How many apples?")
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, prompt_logprobs=2)
    whole, bare = llm.generate([prompt, prompt], [params, dataclasses.replace(params, max_tokens=0)])
    assert (bare.token_ids, bare.text, bare.finish_reason, bare.accept_length) == ([], "", "length", 1.0)
    assert len(whole.token_ids) == 9 and len(whole.prompt_logprobs) == len(prompt) - 1
    assert whole.prompt_logprobs == bare.prompt_logprobs
    deltas = list(llm.stream(prompt, params))
    assert deltas[0].prompt_logprobs == whole.prompt_logprobs
    assert not any(delta.prompt_logprobs for delta in deltas[1:])


def test_a_stop_string_cuts_text_and_tokens_and_frees_the_request(llm: LLM) -> None:
    ids = [ord(char) for char in "xyz!"]
    params = SamplingParams(temperature=0, max_tokens=9, logit_bias={ids[0]: 50.0}, stop=("xxx",))
    output = llm.generate(["abc"], params)[0]
    assert (output.text, output.finish_reason, output.token_ids) == ("", "stop", [ids[0]] * 3)
    assert is_idle(llm)


def test_leaving_a_stream_early_aborts_the_request(llm: LLM) -> None:
    stream = llm.stream("abc", GREEDY)
    next(stream)
    assert llm.engine.has_work()
    stream.close()
    assert is_idle(llm)


def test_one_bad_prompt_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="maximum context length"):
        llm.generate([[1], [2] * 1000], GREEDY)
    assert is_idle(llm)


@pytest.mark.parametrize(
    ("prompts", "params", "error"), [(["a", "b"], [GREEDY], InvalidRequest), (["a", 5], GREEDY, TypeError)]
)
def test_whatever_is_wrong_with_a_call_leaves_nothing_behind(
    prompts: list[str], params: SamplingParams | list[SamplingParams], error: type[Exception], llm: LLM
) -> None:
    with pytest.raises(error):
        llm.generate(prompts, params)
    assert is_idle(llm)


def test_params_may_differ_per_prompt_and_logprobs_match_tokens(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, logprobs=2) for n in (3, 5)]
    for output, count in zip(llm.generate(["a", "b"], params), (3, 5), strict=True):
        assert len(output.token_ids) == len(output.logprobs) == count
        assert [entry.top_ids[0] for entry in output.logprobs] == output.token_ids


def test_the_offline_engine_needs_neither_fastapi_nor_zeromq() -> None:
    code = "import sys, server.llm; print([m for m in ('fastapi', 'zmq', 'uvicorn', 'msgspec') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_streams_may_be_read_in_turns_and_generate_called_meanwhile(llm: LLM) -> None:
    prompts = ["one", "two", "three"]
    expected = [output.text for output in llm.generate(prompts, GREEDY)]
    texts = ["", ""]
    streams = [llm.stream(prompt, GREEDY) for prompt in prompts[:2]]
    for deltas in itertools.zip_longest(*streams):
        for index, delta in enumerate(deltas):
            texts[index] += delta.text if delta else ""
        assert llm.generate(prompts[2:], GREEDY)[0].text == expected[2]
    assert texts == expected[:2] and is_idle(llm)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1e-50},
        {"max_tokens": -1},
        {"logprobs": -1},
        {"logprobs_mode": "raw"},
        {"seed": 2**63},
        {"repetition_penalty": 1e-46},
        {"logit_bias": {100_000: 1.0}},
        {"stop_token_ids": (-1,)},
        {"stop": "ab"},
        {"stop": ("",)},
    ],
)
def test_settings_without_a_law_are_refused_by_name(llm: LLM, settings: dict[str, object]) -> None:
    (name,) = settings
    with pytest.raises(InvalidRequest, match=name):
        llm.generate(["abc"], SamplingParams(**settings))  # type: ignore[arg-type]
    assert is_idle(llm)


def test_drafts_behind_a_stop_string_are_not_counted(llm: LLM) -> None:
    bias = SamplingParams(temperature=0, max_tokens=12, logit_bias={ord("x"): 50.0}, stop=("xx",))
    output = llm.generate(["abc"], bias)[0]
    assert len(output.token_ids) == 2 and output.num_accepted <= len(output.token_ids)


class ScriptedEngine:
    """Says what it is told to: one list of messages per step. `added` and `aborted` record what it was asked."""

    def __init__(self, *steps: list[TokenOutput | Failed]):
        self.steps = iter(steps)
        self.added: list[Generate] = []
        self.aborted: list[str] = []

    def add(self, request: Generate) -> None:
        self.added.append(request)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def step(self) -> list[TokenOutput | Failed]:
        return next(self.steps)


@pytest.fixture
def make_scripted(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[LLM, ScriptedEngine]]:
    """Makes an LLM over an engine that gives the steps of a script; requests are llm-0, llm-1, ..."""

    def make(*steps: list[TokenOutput | Failed]) -> tuple[LLM, ScriptedEngine]:
        engine = ScriptedEngine(*steps)
        monkeypatch.setattr("server.llm.Engine", lambda config: engine)
        return LLM(model=str(checkpoint)), engine

    return make


def test_priority_timeout_and_salt_reach_the_engine_with_every_prompt(make_scripted) -> None:
    end = [TokenOutput(f"llm-{i}", [70], finish_reason=FINISH_LENGTH, num_cached=i) for i in range(3)]
    llm, engine = make_scripted(end[:2], end[2:])
    outputs = llm.generate([[5], [6]], GREEDY, priority=-3, timeout=2.5, cache_salt="mine")
    outputs += llm.stream([7], GREEDY, priority=4, timeout=1, cache_salt="yours")
    assert [output.num_cached for output in outputs] == [0, 1, 2]
    terms = [(message.priority, message.timeout, message.cache_salt) for message in engine.added]
    assert terms == [(-3, 2.5, "mine")] * 2 + [(4, 1, "yours")]


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_a_timeout_that_is_over_at_once_is_refused(make_scripted, timeout: float) -> None:
    llm, engine = make_scripted()
    with pytest.raises(InvalidRequest, match="must be above 0 seconds"):
        llm.generate([[5]], GREEDY, timeout=timeout)
    assert engine.added == []


def test_steps_without_news_and_outputs_of_requests_that_are_over_are_passed_over(make_scripted) -> None:
    late = TokenOutput("llm-0", [71], finish_reason=FINISH_LENGTH)
    llm, _ = make_scripted(
        [],
        [TokenOutput("llm-0", [70])],
        *[[]] * 50,
        [late, late, Failed("llm-0", "ModelFailure", "late")],
        [late],
        [TokenOutput("llm-1", [72], finish_reason=FINISH_LENGTH)],
    )
    assert llm.generate([[5]], GREEDY)[0].token_ids == [70, 71]
    assert llm.generate([[5]], GREEDY)[0].token_ids == [72]


def test_a_timeout_after_the_first_token_ends_the_output_with_abort(make_scripted, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the fox")
    llm, _ = make_scripted(
        [TokenOutput("llm-0", ids, num_steps=1, num_proposed=2, num_accepted=1, num_cached=3)],
        [TokenOutput("llm-0", [], [], FINISH_ABORT, num_steps=1, num_proposed=2, num_accepted=1, num_cached=3)],
    )
    output = llm.generate([[5]], SamplingParams(stop=("fox!",), logprobs=0))[0]
    assert (output.text, output.token_ids, output.finish_reason) == ("the fox", ids, "abort")
    assert (output.num_steps, output.num_proposed, output.num_accepted, output.num_cached) == (1, 2, 1, 3)


@pytest.mark.parametrize("kind", [RequestTimeout, ModelFailure])
def test_a_failed_prompt_raises_its_error_and_takes_the_others_along(make_scripted, kind: type[Exception]) -> None:
    llm, engine = make_scripted([TokenOutput("llm-0", [70])], [Failed("llm-1", kind.__name__, "no luck")])
    with pytest.raises(kind, match="no luck"):
        llm.generate([[5], [6]], GREEDY)
    assert set(engine.aborted) == {"llm-0", "llm-1"}


def test_a_failed_stream_gives_what_there_was_and_leaves_other_streams_alone(make_scripted) -> None:
    llm, _ = make_scripted(
        [TokenOutput("llm-0", [70])],
        [TokenOutput("llm-0", [71]), Failed("llm-0", "ModelFailure", "not finite"), TokenOutput("llm-1", [80])],
        [TokenOutput("llm-1", [81], finish_reason=FINISH_LENGTH)],
    )
    failing, other = llm.stream([5], GREEDY), llm.stream([6], GREEDY)
    assert [next(stream).token_ids for stream in (failing, other, failing)] == [[70], [80], [71]]
    with pytest.raises(ModelFailure, match="not finite"):
        next(failing)
    assert [delta.token_ids for delta in other] == [[81]]


@pytest.mark.parametrize("num_used", range(1, 6))
def test_a_step_cut_by_a_stop_string_counts_drafts_up_to_its_last_token(
    make_scripted, tokenizer: Tokenizer, num_used: int
) -> None:
    first, *others = tokenizer.encode("the quick brown fox")
    llm, _ = make_scripted(
        [TokenOutput("llm-0", [first], num_steps=1, num_proposed=3, num_accepted=1)],
        [TokenOutput("llm-0", others[:6], num_steps=2, num_proposed=3 + 8, num_accepted=1 + 5)],
    )
    output = llm.generate([[5]], SamplingParams(stop=(tokenizer.decode(others[:num_used]),)))[0]
    assert (output.finish_reason, len(output.token_ids)) == (FINISH_STOP, 1 + num_used)
    assert (output.num_proposed, output.num_accepted) == (3 + num_used, 1 + min(num_used, 5))


def test_weights_are_updated_from_a_directory_or_from_tensors(llm: LLM, other_checkpoint: Path) -> None:
    before = llm.generate(["abc"], GREEDY)
    path, store = llm.config.model, llm.engine.runner.store
    tensors = {name: store.export(name) for name in store.checksums()}
    stream = llm.stream("abc", GREEDY)
    first = next(stream)
    llm.update_weights(other_checkpoint, "other")
    assert llm.engine.stats().weight_version == "other"
    rest = [token for delta in stream for token in delta.token_ids]
    assert len(first.token_ids) + len(rest) == 24
    assert llm.generate(["abc"], GREEDY) != before
    llm.update_weights(tensors)
    assert llm.engine.stats().weight_version == "2" and llm.generate(["abc"], GREEDY) == before
    with pytest.raises(InvalidRequest, match="nowhere"):
        llm.update_weights("/nowhere")
    llm.update_weights(path)
    assert llm.generate(["abc"], GREEDY) == before and is_idle(llm)


def test_tensors_may_share_memory(llm: LLM) -> None:
    before, store = llm.generate(["abc"], GREEDY), llm.engine.runner.store
    tensors = {name: store.export(name) for name in store.checksums()}
    tied = {"lm_head.weight": tensors["model.embed_tokens.weight"], "model.norm.weight": tensors["mtp.norm.weight"]}
    llm.update_weights(tensors | tied)
    assert store.export("model.norm.weight").equal(tensors["mtp.norm.weight"])
    llm.update_weights(tensors)
    assert llm.generate(["abc"], GREEDY) == before and is_idle(llm)
