"""Speculation changes nothing: the same tokens for every mtp_step, chunk size, batch, preemption and abort."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kernels.cpu.library import load_library
from server.engine import Engine
from server.messages import Generate, SamplingParams
from unit_tests.checkpoints import make_checkpoint
from unit_tests.server.engines import assert_nothing_left, generate, make_engine, make_prompts, run, tokens_of

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
SEEDED = SamplingParams(temperature=1, max_tokens=20, ignore_eos=True, seed=11)
PROMPTS = make_prompts(200, 130, 256, seed=1)
NUM_SEEDED = 60
FEW_PROMPTS = make_prompts(24, 130, 256, seed=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("dense"), num_layers=4, close_draft=True)


@pytest.fixture(scope="module")
def moe_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("moe"), moe=True, num_layers=4, close_draft=True)


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Callable[[SamplingParams], list[list[int]]]:
    """The 200 prompts' tokens without speculation, for greedy and seeded sampling."""
    engine = make_engine(checkpoint, max_running_requests=32)
    greedy, seeded = generate(engine, PROMPTS, GREEDY), generate(engine, PROMPTS[:NUM_SEEDED], SEEDED)
    return lambda params: greedy if params is GREEDY else seeded


def assert_every_accept_length_occurs(engine: Engine) -> None:
    counters = engine.scheduler.counters
    at_least = [counters.num_verify_steps, *counters.accepted_per_position, 0]
    exactly = [more - fewer for more, fewer in itertools.pairwise(at_least)]
    assert min(exactly) > 0, f"steps that accepted 0, 1, ... drafts: {exactly}"


@pytest.mark.parametrize(("mtp_step", "chunk_size"), [(0, 7), (1, 64), (2, 512), (3, 7), (4, 64)])
def test_greedy_and_seeded_tokens_do_not_depend_on_drafts_or_chunks(
    checkpoint: Path, plain: Callable[[SamplingParams], list[list[int]]], mtp_step: int, chunk_size: int
) -> None:
    engine = make_engine(checkpoint, mtp_step=mtp_step, chunked_prefill_size=chunk_size, max_running_requests=32)
    assert generate(engine, PROMPTS, GREEDY) == plain(GREEDY)
    assert_every_accept_length_occurs(engine)
    assert generate(engine, PROMPTS[:NUM_SEEDED], SEEDED) == plain(SEEDED)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [1, 7, 64, 512])
@pytest.mark.parametrize("mtp_step", [0, 1, 2, 3, 4])
def test_greedy_tokens_survive_preemption_and_aborts_at_every_depth_and_chunk_size(
    checkpoint: Path, plain: Callable[[SamplingParams], list[list[int]]], mtp_step: int, chunk_size: int
) -> None:
    engine = make_engine(
        checkpoint,
        mtp_step=mtp_step,
        chunked_prefill_size=chunk_size,
        max_running_requests=32,
        max_model_len=160,
        max_total_tokens=320,
        page_size=8,
    )
    prompts, expected = PROMPTS, plain(GREEDY)
    if chunk_size == 1:  # a step per prompt token: shorter prompts
        prompts = [prompt[:30] for prompt in PROMPTS]
        expected = generate(make_engine(checkpoint, max_running_requests=32), prompts, GREEDY)
    assert serve_with_aborts(engine, prompts, GREEDY) == expected
    assert engine.scheduler.counters.num_preemptions >= 12


@pytest.mark.parametrize("mtp_step", [0, 3, 8])
def test_preempted_requests_continue_with_the_same_tokens(
    checkpoint: Path, plain: Callable[[SamplingParams], list[list[int]]], mtp_step: int
) -> None:
    engine = make_engine(checkpoint, mtp_step=mtp_step, max_model_len=160, max_total_tokens=200, page_size=4)
    prompts, params = PROMPTS[:NUM_SEEDED], [GREEDY, SEEDED] * (NUM_SEEDED // 2)
    expected = [plain(one)[index] for index, one in enumerate(params)]
    assert generate(engine, prompts, params) == expected
    assert engine.scheduler.counters.num_preemptions > 0


def serve_with_aborts(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    """Serve the prompts, with a doomed twin beside every fourth that is aborted after some steps, and the youngest
    request thrown out of the cache now and then."""
    doomed: list[str] = []
    for index, prompt in enumerate(prompts):
        engine.add(Generate(str(index), prompt, params))
        if index % 4 == 0:
            doomed.append(f"doomed-{index}")
            engine.add(Generate(doomed[-1], prompt[::-1], params))
    tokens: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    num_steps = 0
    while engine.has_work():
        for output in engine.step():
            tokens.get(output.request_id, []).extend(output.token_ids)
        num_steps += 1
        if num_steps % 5 == 0 and doomed:
            engine.abort(doomed.pop(0))
        if num_steps % 7 == 0 and engine.scheduler.running and engine.scheduler.counters.num_preemptions < 12:
            engine.scheduler._preempt(engine.scheduler.running[-1])
    assert_nothing_left(engine)
    return list(tokens.values())


@pytest.mark.parametrize("mtp_step", [1, 4])
def test_moe_tokens_do_not_depend_on_drafts(moe_checkpoint: Path, mtp_step: int) -> None:
    expected = generate(make_engine(moe_checkpoint), FEW_PROMPTS, GREEDY)
    engine = make_engine(moe_checkpoint, mtp_step=mtp_step, chunked_prefill_size=48)
    assert generate(engine, FEW_PROMPTS, GREEDY) == expected


@pytest.mark.parametrize("mode", ["auto", "eagle", "vanilla"])
@pytest.mark.parametrize("mtp_step", [1, 2, 3, 5])
def test_several_mtp_layers_change_nothing_in_any_mode(
    tmp_path_factory: pytest.TempPathFactory, mode: str, mtp_step: int
) -> None:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("layers"), num_layers=4, mtp_layers=3, close_draft=True)
    expected = generate(make_engine(checkpoint), FEW_PROMPTS, GREEDY)
    engine = make_engine(checkpoint, mtp_step=mtp_step, mtp_mode=mode, chunked_prefill_size=33)
    assert generate(engine, FEW_PROMPTS, GREEDY) == expected
    assert engine.scheduler.counters.num_accepted > 0


def test_a_seeded_request_gives_the_same_tokens_alone_and_in_any_company(checkpoint: Path) -> None:
    mixed = [
        SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=20),
        SamplingParams(temperature=0, max_tokens=20),
        SamplingParams(temperature=1.3, top_k=20, presence_penalty=1.5, seed=2, max_tokens=20),
        SamplingParams(temperature=1, min_p=0.05, repetition_penalty=1.2, seed=3, max_tokens=20),
        SamplingParams(temperature=1, logit_bias={5: 4.0, 9: -100.0}, min_tokens=10, seed=4, max_tokens=20),
        SamplingParams(temperature=0, frequency_penalty=0.7, max_tokens=20),
    ]
    prompts = FEW_PROMPTS[: len(mixed)]
    plain = make_engine(checkpoint)
    alone = [generate(plain, [prompt], one)[0] for prompt, one in zip(prompts, mixed, strict=True)]
    for mtp_step in (0, 1, 3):
        engine = make_engine(checkpoint, mtp_step=mtp_step, chunked_prefill_size=50)
        assert generate(engine, prompts * 3, mixed * 3) == alone * 3


def test_logprobs_do_not_depend_on_drafts(checkpoint: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, logprobs=3)
    runs = [run(make_engine(checkpoint, mtp_step=k), FEW_PROMPTS, params) for k in (0, 3)]
    plain, drafted = ([[entry for m in one for entry in m.logprobs] for one in messages] for messages in runs)
    for tokens, expected, entries in zip(tokens_of(runs[0]), plain, drafted, strict=True):
        assert len(tokens) == len(expected) == len(entries)
        for token, one, other in zip(tokens, expected, entries, strict=True):
            assert one.top_ids == other.top_ids and one.top_ids[0] == token
            assert one.logprob == one.top_logprobs[0] == pytest.approx(other.logprob, abs=1e-9)


@pytest.mark.parametrize("has_library", [True, False])
def test_processed_logprobs_and_penalties_do_not_depend_on_drafts(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, has_library: bool
) -> None:
    if not has_library:
        monkeypatch.setattr("kernels.sampling.load_library", lambda: None)
    penalties = {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2}
    mode = {"logprobs": 3, "logprobs_mode": "processed_logprobs", "max_tokens": 20, "ignore_eos": True}
    sampled = SamplingParams(temperature=0.8, top_k=6, seed=3, **penalties, **mode)  # type: ignore[arg-type]
    greedy = SamplingParams(temperature=0, **penalties, **mode)  # type: ignore[arg-type]
    params = [sampled, greedy, replace(sampled, logprobs_mode="raw_logprobs"), SEEDED] * (len(FEW_PROMPTS) // 4)
    plain, drafted = (run(make_engine(checkpoint, mtp_step=k), FEW_PROMPTS, params) for k in (0, 3))
    assert tokens_of(plain) == tokens_of(drafted)
    for one, other, asked in zip(plain, drafted, params, strict=True):
        expected, entries = ([entry for message in each for entry in message.logprobs] for each in (one, other))
        assert len(entries) == len(expected) == (20 if asked.logprobs else 0)
        for left, right in zip(expected, entries, strict=True):
            assert left.top_ids == right.top_ids and left.rank == right.rank
            assert left.logprob == pytest.approx(right.logprob, abs=1e-9)
            assert left.top_logprobs == pytest.approx(right.top_logprobs, abs=1e-9)
            assert left.rank <= 6 or asked is not sampled


def test_prompts_of_every_length_from_1_to_130_tokens_work(checkpoint: Path) -> None:
    prompts = [PROMPTS[1][:length] for length in range(1, 131)]
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    expected = generate(make_engine(checkpoint), prompts, params)
    engine = make_engine(checkpoint, mtp_step=1, chunked_prefill_size=61, max_running_requests=9)
    assert generate(engine, prompts, params) == expected


@pytest.mark.skipif(load_library() is None, reason="bit-exact decoding needs the C++ kernels")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("moe", [False, True])
def test_verify_steps_compute_the_very_bits_of_plain_decoding(
    checkpoint: Path, moe_checkpoint: Path, moe: bool, dtype: str
) -> None:
    """In the precisions people serve: after the same prefill, tokens and log-probabilities equal bit for bit."""
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=0)
    results = []
    for mtp_step in (0, 1, 3, 7):
        engine = make_engine(
            moe_checkpoint if moe else checkpoint, dtype=dtype, mtp_step=mtp_step, max_running_requests=8
        )
        messages = run(engine, FEW_PROMPTS[:8], params)
        logprobs = [[entry.logprob for message in one for entry in message.logprobs] for one in messages]
        results.append((tokens_of(messages), logprobs))
        assert mtp_step == 0 or engine.scheduler.counters.num_accepted > 0
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("mtp_step", [0, 3])
def test_without_the_cpu_decoder_the_torch_layers_give_the_same_tokens(
    checkpoint: Path,
    plain: Callable[[SamplingParams], list[list[int]]],
    mtp_step: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The way of machines without a compiler, and of prompts too long for it."""
    monkeypatch.setattr("models.layers.cpu_decoder.serves", lambda weight: False)
    engine = make_engine(checkpoint, mtp_step=mtp_step, chunked_prefill_size=64, max_running_requests=32)
    assert generate(engine, PROMPTS[:60], GREEDY) == plain(GREEDY)[:60]
    assert generate(engine, PROMPTS[:30], SEEDED) == plain(SEEDED)[:30]
