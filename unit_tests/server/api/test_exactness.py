"""Real engines behind the endpoints: drafts, streams and the way of asking change nothing of an answer."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from server.tokenizer import Tokenizer
from unit_tests.checkpoints import make_checkpoint
from unit_tests.server.api.conftest import Serving
from unit_tests.server.api.test_completion_prompts import complete
from unit_tests.server.engines import make_engine

PATH = "/v1/completions"
PROMPT_LENGTHS = (1, 2, 5, 17, 40, 90)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("exact"), num_layers=4, close_draft=True)


@pytest.fixture(scope="module")
def servings(checkpoint: Path) -> Iterator[list[Serving]]:
    """Without and with drafts; the second also with small chunks, a prefix cache and steps in flight."""
    tokenizer = Tokenizer(checkpoint)
    engines = (
        make_engine(checkpoint),
        make_engine(checkpoint, mtp_step=3, chunked_prefill_size=24, prefix_cache="on", overlap="on"),
    )
    plain, drafting = (Serving(engine, tokenizer) for engine in engines)
    with plain.listening(), drafting.listening():
        yield [plain, drafting]


@torch.inference_mode()
def law(serving: Serving, ids: list[int]) -> torch.Tensor:
    """[P - 1, V]: the log-softmax behind every token but the last."""
    target = serving.engine.runner.target
    hidden = target.forward_sequence(torch.tensor([ids]))[0]
    return target.compute_logits(hidden).log_softmax(-1)[:-1]


def make_request(rng: random.Random) -> dict[str, Any]:
    """Any prompt with any settings that do not depend on speed."""
    length = rng.choice(PROMPT_LENGTHS)
    ids = [rng.randrange(256) for _ in range(length)]
    text = "".join(rng.choice("the quick naïve café 中文字符 😀") for _ in range(length))
    fields: dict[str, Any] = {
        "prompt": rng.choice([ids, text]),
        "max_tokens": rng.randint(1, 30),
        "seed": rng.randrange(99),
    }
    choices: dict[str, list[Any]] = {
        "temperature": [0, 1],
        "top_k": [-1, 20],
        "top_p": [1, 0.9],
        "presence_penalty": [0, 1.5],
        "repetition_penalty": [1, 1.2],
        "min_tokens": [0, 1],
        "ignore_eos": [True, False],
        "logprobs": [None, 0, 3],
        "echo": [False, True],
        "skip_special_tokens": [True, False],
        "include_stop_str_in_output": [False, True],
        "stop_token_ids": [None, [rng.randrange(256) for _ in range(9)]],
        "logit_bias": [None, {str(rng.randrange(256)): 4}],
        "n": [1, 2],
        "return_token_ids": [True],
        "return_tokens_as_token_ids": [False, True],
    }
    return fields | {name: rng.choice(values) for name, values in choices.items()}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Choices are equal, log-probabilities but for rounding."""
    for name in ("text", "finish_reason", "stop_reason"):
        assert found[name] == expected[name], name
    ours, theirs = found["logprobs"], expected["logprobs"]
    assert (ours is None) == (theirs is None)
    if ours is not None:
        assert (ours["tokens"], ours["text_offset"]) == (theirs["tokens"], theirs["text_offset"])
        for mine, yours in zip(_numbers(ours), _numbers(theirs), strict=True):
            assert mine == pytest.approx(yours, abs=1e-9)


def _numbers(logprobs: dict[str, Any]) -> list[Any]:
    return [*logprobs["token_logprobs"], *logprobs["top_logprobs"]]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_drafts_and_streams_change_nothing(servings: list[Serving], seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(12):
        fields = make_request(rng)
        free = servings[0].complete(**fields)["choices"]
        output = free[0]["text"][len(free[0]["text"]) // 2 :]
        if output and rng.random() < 0.7:
            start = rng.randrange(len(output))
            fields["stop"] = [output[start : start + rng.randint(1, 3)], "never to be seen"]
        whole = servings[0].complete(**fields)["choices"]
        for index, expected in enumerate(whole):
            assert len(expected["token_ids"]) <= fields["max_tokens"]
            for serving in servings:
                for stream in (False, True):
                    assert_same(complete(serving, stream, index, **fields), expected)


@pytest.mark.parametrize("max_tokens", [0, 1, 7])
@pytest.mark.parametrize("length", [1, 2, 60])
def test_prompts_are_scored_by_the_law_with_and_without_drafts(
    servings: list[Serving], max_tokens: int, length: int
) -> None:
    rng = random.Random(length)
    ids = [rng.randrange(256) for _ in range(length)]
    for serving in servings:
        fields = {"max_tokens": max_tokens, "echo": True, "logprobs": 4, "temperature": 0, "ignore_eos": True}
        found = serving.complete([ids], **fields, prompt_logprobs=2, return_token_ids=True)["choices"][0]
        expected = law(serving, ids + found["token_ids"])
        values = expected.gather(1, torch.tensor([ids + found["token_ids"]])[:, 1:].T)[:, 0].tolist()
        assert found["logprobs"]["token_logprobs"][1:] == pytest.approx(values, abs=1e-9)
        best = expected.topk(4).values.tolist()
        for top, row in zip(found["logprobs"]["top_logprobs"][1:], best, strict=True):
            assert sorted(top.values(), reverse=True)[:4] == pytest.approx(row, abs=1e-9)
        for token_id, row, entry in zip(ids[1:], expected, found["prompt_logprobs"][1:], strict=False):
            assert entry[str(token_id)]["logprob"] == pytest.approx(row[token_id].item(), abs=1e-9)
            assert entry[str(token_id)]["rank"] == 1 + int((row > row[token_id]).sum())


def test_the_best_choices_are_the_likeliest_per_token_best_first(servings: list[Serving]) -> None:
    fields = {"prompt": "the quick", "seed": 3, "max_tokens": 12}
    for serving in servings:
        every = serving.complete(**fields, n=6, logprobs=0)["choices"]
        means = [sum(c["logprobs"]["token_logprobs"]) / len(c["logprobs"]["tokens"]) for c in every]
        ranked = sorted(range(6), key=lambda index: -means[index])
        answer = serving.complete(**fields, n=2, best_of=6)
        assert [choice["text"] for choice in answer["choices"]] == [every[index]["text"] for index in ranked[:2]]
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        assert [choice["logprobs"] for choice in answer["choices"]] == [None, None]
        assert answer["usage"]["completion_tokens"] == sum(len(c["logprobs"]["tokens"]) for c in every)


def test_origins_and_counts_of_drafts_agree(servings: list[Serving]) -> None:
    fields = {"prompt": [200, 3], "max_tokens": 40, "temperature": 0, "ignore_eos": True, "return_spec": True}
    plain, drafting = (serving.complete(**fields) for serving in servings)
    assert plain["choices"][0]["spec"] == {"accepted": 0, "proposed": 0, "origins": "p" + 39 * "t"}
    assert plain["metrics"]["speculative_decoding"] is None
    spec, found = drafting["choices"][0]["spec"], drafting["metrics"]["speculative_decoding"]
    assert spec["accepted"] == found["num_accepted_draft_tokens"] == spec["origins"].count("d") > 0
    assert spec["proposed"] == found["num_draft_tokens"] == sum(found["per_step_drafted"])
    assert len(spec["origins"]) == 40 and spec["origins"][0] == "p"
    details = drafting["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] == spec["accepted"] == sum(found["per_step_accepted"])
    assert found["mean_acceptance_length"] == 1 + spec["accepted"] / found["num_spec_steps"]
    assert drafting["timings"]["draft_n"] == spec["proposed"]
    assert drafting["metrics"]["queue_time_ms"] is not None


@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_prompt_that_fills_the_context_is_scored(servings: list[Serving], logprobs: int | None) -> None:
    rng = random.Random(3)
    ids = [rng.randrange(256) for _ in range(servings[0].client.ready.max_model_len)]
    fields = {"max_tokens": 0, "echo": True, "logprobs": logprobs, "prompt_logprobs": 1}
    for serving in servings:
        for serving_again in (serving, serving):  # with and without what the prefix cache has of it
            found = serving_again.complete([ids, ids[:-1]], **fields)
            values = law(serving, ids).gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()
            for choice, prompt in zip(found["choices"], (ids, ids[:-1]), strict=True):
                told = [
                    entry[str(i)]["logprob"] for i, entry in zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True)
                ]
                assert told == pytest.approx(values[: len(told)], abs=1e-9)
                assert (choice["finish_reason"], found["usage"]["completion_tokens"]) == ("length", 0)
        body = {
            "input_ids": ids,
            "return_logprob": True,
            "logprob_start_len": 0,
            "sampling_params": {"max_new_tokens": 0},
        }
        scores = serving.http.post("/generate", json=body).json()["meta_info"]["input_token_logprobs"]
        assert [score[0] for score in scores[1:]] == pytest.approx(values, abs=1e-9)


@pytest.mark.parametrize(("num_left", "fields"), [(0, {"max_tokens": 1}), (-1, {"max_tokens": 0, "echo": True})])
def test_a_prompt_over_the_context_is_refused(servings: list[Serving], num_left: int, fields: dict[str, Any]) -> None:
    ids = [1] * (servings[0].client.ready.max_model_len - num_left)
    answer = servings[0].http.post(PATH, json={"prompt": ids, **fields})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message.startswith(
        f"This model's maximum context length is {len(ids) + num_left} tokens. However, your prompt"
    )
    assert ("for the output" in message) == (num_left == 0)


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_without_max_tokens_a_prompt_that_leaves_one_token_gets_it(servings: list[Serving], endpoint: str) -> None:
    limit = servings[0].client.ready.max_model_len
    for serving in servings:
        body = {"prompt": [1] * (limit - 1), "messages": [{"role": "user", "content": "x" * 2 * limit}]}
        body |= {"truncate_prompt_tokens": limit - 1, "temperature": 0, "ignore_eos": True}
        usage = serving.http.post(endpoint, json=body).json()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (limit - 1, 1)
