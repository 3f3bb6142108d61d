"""Log-probabilities of prompts are those of one pass over the whole sequence, however the engine cuts it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine import Engine
from server.messages import FINISH_LENGTH, Generate, SamplingParams, TokenLogprobs, TokenOutput
from unit_tests.checkpoints import make_checkpoint
from unit_tests.server.engines import generate, make_engine, make_prompts, run, tokens_of

VOCAB_SIZE = 256
SCORED = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, prompt_logprobs=5)
BARE = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=2)
PLAIN = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("scores"), num_layers=4, close_draft=True)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return make_prompts(10, 150, VOCAB_SIZE, seed=4)


@torch.inference_mode()
def law(engine: Engine, prompt: list[int]) -> torch.Tensor:
    """[P - 1, V]: the log-softmax behind every prompt token but the last, from one pass without a cache."""
    target = engine.runner.target
    hidden = target.forward_sequence(torch.tensor([prompt]))[0]
    return target.compute_logits(hidden).log_softmax(-1)[:-1]


def check(engine: Engine, prompt: list[int], scores: Sequence[TokenLogprobs], num_top: int, error: float) -> None:
    """The scores are the law's, to `error`."""
    expected = law(engine, prompt)
    assert len(scores) == len(prompt) - 1
    for row, token_id, score in zip(expected, prompt[1:], scores, strict=True):
        assert score.logprob == pytest.approx(row[token_id].item(), abs=error)
        assert score.top_logprobs == pytest.approx(row.topk(num_top).values.tolist(), abs=error)
        assert [row[top].item() for top in score.top_ids] == pytest.approx(score.top_logprobs, abs=error)
        if error < 1e-9:
            assert score.rank == 1 + int((row > row[token_id]).sum())
            assert score.top_ids == row.topk(num_top).indices.tolist()


def scores_of(messages: list[TokenOutput]) -> list[TokenLogprobs]:
    """What the first message brought, and none of the others did."""
    assert not any(message.prompt_logprobs for message in messages[1:])
    return messages[0].prompt_logprobs


@pytest.mark.parametrize("mtp_step", [0, 3])
@pytest.mark.parametrize("chunk", [1, 7, 33, 512])
def test_scores_are_the_laws_for_every_chunk_size(
    checkpoint: Path, prompts: list[list[int]], mtp_step: int, chunk: int
) -> None:
    engine = make_engine(checkpoint, mtp_step=mtp_step, chunked_prefill_size=chunk, overlap=["on", "off"][chunk % 2])
    messages = run(engine, prompts, SCORED)
    for prompt, one in zip(prompts, messages, strict=True):
        check(engine, prompt, scores_of(one), 5, error=1e-12)
    assert tokens_of(messages) == generate(engine, prompts, PLAIN)


@pytest.mark.parametrize("mtp_step", [0, 3])
def test_without_an_output_token_the_request_ends_after_its_last_chunk(
    checkpoint: Path, prompts: list[list[int]], mtp_step: int
) -> None:
    engine = make_engine(checkpoint, mtp_step=mtp_step, chunked_prefill_size=40, overlap="on", prefix_cache="on")
    each = [[BARE, SCORED, PLAIN][index % 3] for index in range(len(prompts))]
    messages = run(engine, prompts, each)
    for prompt, params, one in zip(prompts, each, messages, strict=True):
        if params is BARE:
            assert [(message.token_ids, message.finish_reason) for message in one] == [([], FINISH_LENGTH)]
            check(engine, prompt, scores_of(one), 2, error=1e-12)
        if params is PLAIN:
            assert scores_of(one) == []
    assert engine.scheduler.counters.num_output_tokens == sum(params is not BARE for params in each) * 6


def test_float32_scores_are_within_a_hundred_thousandth(checkpoint: Path, prompts: list[list[int]]) -> None:
    engine = make_engine(checkpoint, dtype="float32", mtp_step=3, chunked_prefill_size=20)
    for prompt, one in zip(prompts, run(engine, prompts, SCORED), strict=True):
        check(engine, prompt, scores_of(one), 5, error=1e-5)


@pytest.mark.parametrize("mtp_step", [0, 3])
def test_a_scored_prompt_reuses_nothing_and_leaves_its_pages_to_others(checkpoint: Path, mtp_step: int) -> None:
    engine = make_engine(
        checkpoint, mtp_step=mtp_step, chunked_prefill_size=48, prefix_cache="on", checkpoint_interval=64
    )
    (prompt,) = make_prompts(2, 200, VOCAB_SIZE, seed=1)[1:]
    ((*_, plain),) = run(engine, [prompt + [5]], PLAIN)
    for _ in range(2):
        (scored,) = run(engine, [prompt + [6]], SCORED)
        check(engine, prompt + [6], scores_of(scored), 5, error=1e-12)
        assert scored[0].num_cached == 0
    assert engine.scheduler.cache.counters.misses["prompt_logprobs"] == 2
    (again,) = run(engine, [prompt + [6, 7]], PLAIN)
    assert plain.num_cached == 0 and again[0].num_cached > 100


@pytest.mark.parametrize("mtp_step", [0, 3])
def test_a_preempted_prompt_is_scored_once_and_completely(
    checkpoint: Path, prompts: list[list[int]], mtp_step: int
) -> None:
    settings: dict[str, Any] = {"max_total_tokens": 400, "page_size": 8, "prefix_cache": "on", "overlap": "on"}
    engine = make_engine(checkpoint, mtp_step=mtp_step, chunked_prefill_size=24, **settings)
    long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, prompt_logprobs=3)
    messages = run(engine, prompts, long)
    assert engine.scheduler.counters.num_preemptions > 0
    for prompt, one in zip(prompts, messages, strict=True):
        check(engine, prompt, scores_of(one), 3, error=1e-12)
    assert tokens_of(messages) == generate(make_engine(checkpoint), prompts, long)


def test_a_prompt_that_is_preempted_between_its_chunks_is_scored_completely(
    checkpoint: Path, prompts: list[list[int]]
) -> None:
    engine, messages = make_engine(checkpoint, mtp_step=2, chunked_prefill_size=32, prefix_cache="on"), []
    engine.add(Generate("a", prompts[1], SCORED))
    while engine.has_work():
        messages += engine.step()
        request = next(iter(engine.scheduler.running), None)
        if request is not None and request.epoch == 0 and request.num_computed == 96:
            engine.scheduler._preempt(request)
    assert engine.scheduler.counters.num_preemptions == 1
    check(engine, prompts[1], scores_of(messages), 5, error=1e-12)


def test_pieces_of_any_size_give_the_same_scores(
    checkpoint: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, small = (make_engine(checkpoint, max_running_requests=rows) for rows in (300, 1))
    monkeypatch.setattr("server.backend.prompt_scores._LEAST_ROWS", 1)
    expected = [scores_of(one) for one in run(whole, prompts[:4], SCORED)]
    assert [scores_of(one) for one in run(small, prompts[:4], SCORED)] == expected


def test_more_alternatives_than_tokens_are_all_of_them(checkpoint: Path) -> None:
    engine = make_engine(checkpoint)
    (one,) = run(engine, [[5, 6]], SamplingParams(max_tokens=0, prompt_logprobs=10_000))
    (score,) = scores_of(one)
    assert sorted(score.top_ids) == list(range(engine.ready.vocab_size))


def test_a_prompt_of_one_token_has_no_scores(checkpoint: Path) -> None:
    (one,) = run(make_engine(checkpoint), [[5]], BARE)
    assert scores_of(one) == []
