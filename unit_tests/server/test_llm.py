import itertools
import subprocess
import sys

import pytest

from server.errors import InvalidRequest
from server.llm import LLM, SamplingParams
from unit_tests.checkpoints import make_checkpoint

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("llm"), num_layers=4, close_draft=True)
    return LLM(model=str(checkpoint), mtp_step=2, dtype="float64", max_model_len=256, num_threads=1)


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


def test_a_stop_string_cuts_text_and_tokens_and_frees_the_request(llm: LLM) -> None:
    ids = [ord(char) for char in "xyz!"]
    params = SamplingParams(temperature=0, max_tokens=9, logit_bias={ids[0]: 50.0}, stop=("xxx",))
    output = llm.generate(["abc"], params)[0]
    assert (output.text, output.finish_reason, output.token_ids) == ("", "stop", [ids[0]] * 3)
    assert not llm.engine.has_work()


def test_leaving_a_stream_early_aborts_the_request(llm: LLM) -> None:
    stream = llm.stream("abc", GREEDY)
    next(stream)
    assert llm.engine.has_work()
    stream.close()
    assert not llm.engine.has_work()


def test_one_bad_prompt_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="maximum context length"):
        llm.generate([[1], [2] * 1000], GREEDY)
    assert not llm.engine.has_work()


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
    assert texts == expected[:2] and not llm.engine.has_work()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1e-50},
        {"max_tokens": 0},
        {"logprobs": -1},
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
    assert not llm.engine.has_work()


def test_drafts_behind_a_stop_string_are_not_counted(llm: LLM) -> None:
    bias = SamplingParams(temperature=0, max_tokens=12, logit_bias={ord("x"): 50.0}, stop=("xx",))
    output = llm.generate(["abc"], bias)[0]
    assert len(output.token_ids) == 2 and output.num_accepted <= len(output.token_ids)
