"""The lossless suite again with Triton's kernels, interpreted on the CPU: the engine runs as on a GPU but for graphs.

The tokens must be those of the C++ kernels in float32, for every mtp_step, chunk size and batch, with aborts,
preemption, reused prefixes, overlap and depths that change in every step. About four minutes on two cores.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kernels.gpu.dispatch import triton_takes
from server.backend.decode_step import DecodeStep
from server.engine import Engine
from server.messages import Constraint, SamplingParams
from unit_tests.checkpoints import make_checkpoint
from unit_tests.kernels.gpu import fake_flashinfer
from unit_tests.server.engines import generate, make_engine, make_prompts, run, tokens_of
from unit_tests.server.test_lossless import serve_with_aborts
from unit_tests.server.test_lossless_modes import make_conversations, next_turn, serve, use_random_depths

pytestmark = pytest.mark.slow

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SEEDED = SamplingParams(temperature=1, max_tokens=6, ignore_eos=True, seed=11, presence_penalty=0.5)
PROMPTS = make_prompts(6, 40, 256, seed=1)
EACH = [GREEDY, SEEDED] * 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("triton"), num_layers=4, close_draft=True)


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Callable[[Any], list[list[int]]]:
    """Tokens without speculation, by the C++ kernels."""
    engine = make_engine(checkpoint, dtype="float32")
    return lambda params: generate(engine, PROMPTS, params)


def make_triton_engine(checkpoint: Path, **settings: Any) -> Engine:
    engine = make_engine(checkpoint, dtype="float32", **settings)
    assert isinstance(engine.runner.decode, DecodeStep)
    return engine


@pytest.mark.parametrize(("mtp_step", "chunk_size"), [(0, 7), (1, 64), (2, 512), (3, 7), (4, 64)])
def test_greedy_and_seeded_tokens_do_not_depend_on_drafts_or_chunks(
    checkpoint: Path, plain: Callable[[Any], list[list[int]]], mtp_step: int, chunk_size: int
) -> None:
    with triton_takes("cpu"):
        engine = make_triton_engine(checkpoint, mtp_step=mtp_step, chunked_prefill_size=chunk_size)
        assert generate(engine, PROMPTS, EACH) == plain(EACH)
    assert (engine.scheduler.counters.num_accepted > 0) == (mtp_step > 0)


def test_aborts_and_preemption_leave_the_others_tokens(
    checkpoint: Path, plain: Callable[[Any], list[list[int]]]
) -> None:
    with triton_takes("cpu"):
        engine = make_triton_engine(
            checkpoint, mtp_step=3, chunked_prefill_size=16, max_model_len=80, max_total_tokens=160, page_size=8
        )
        assert serve_with_aborts(engine, PROMPTS, GREEDY) == plain(GREEDY)
    assert engine.scheduler.counters.num_preemptions > 0


def test_reused_prefixes_overlap_and_changing_depths_change_nothing(checkpoint: Path) -> None:
    engine = make_engine(checkpoint, dtype="float32", max_model_len=400)
    conversations = [(prompt, GREEDY) for prompt, _ in make_conversations(4, 3)]
    first = serve(engine, conversations)
    following = next_turn(conversations, first, 1)
    second = serve(engine, following)
    with triton_takes("cpu"):
        engine = make_triton_engine(
            checkpoint, mtp_step=2, max_model_len=400, overlap="on", prefix_cache="on", checkpoint_interval=64
        )
        use_random_depths(engine, 1)
        assert serve(engine, conversations) == first
        assert serve(engine, following) == second
    assert engine.scheduler.cache.counters.num_hits >= 3


def test_masked_outputs_leave_the_decode_step_and_come_back(
    checkpoint: Path, plain: Callable[[Any], list[list[int]]]
) -> None:
    """A decode step has no masks, so it serves batches without masked outputs only."""
    masked = replace(SEEDED, constraint=Constraint("regex", "[a-z]{2}"), min_tokens=5)
    params = [GREEDY, masked, replace(SEEDED, bad_words=((5,),)), GREEDY, masked, SEEDED]
    with triton_takes("cpu"):
        engine = make_triton_engine(checkpoint, mtp_step=2, max_running_requests=3)
        calls, decode = [], engine.runner.decode
        run = decode.run
        decode.run = lambda batch: calls.append(batch.has_matchers) or run(batch)
        assert generate(engine, PROMPTS, params) == plain(params)
    assert calls and not any(calls)


def test_processed_logprobs_leave_the_decode_step_and_come_back(checkpoint: Path) -> None:
    """A decode step writes no processed logits down, so it serves batches of raw log-probabilities only."""
    processed = replace(SEEDED, logprobs=3, logprobs_mode="processed_logprobs", top_k=8)
    params = [processed, replace(SEEDED, logprobs=3), GREEDY, GREEDY, replace(SEEDED, logprobs=3), SEEDED]
    expected = run(make_engine(checkpoint, dtype="float32"), PROMPTS, params)
    with triton_takes("cpu"):
        engine = make_triton_engine(checkpoint, mtp_step=2, max_running_requests=3)
        calls, decode = [], engine.runner.decode
        step = decode.run
        decode.run = lambda batch: calls.append(batch.wants_processed) or step(batch)
        messages = run(engine, PROMPTS, params)
    assert tokens_of(messages) == tokens_of(expected) and calls and not any(calls)
    for one, other in zip(expected, messages, strict=True):
        left, right = ([entry for message in each for entry in message.logprobs] for each in (one, other))
        assert [entry.top_ids for entry in left] == [entry.top_ids for entry in right]
        values = ([entry.logprob for entry in each] for each in (left, right))
        assert next(values) == pytest.approx(next(values), abs=1e-4)


def test_prefill_in_flashinfers_hands_leaves_the_tokens(
    checkpoint: Path, plain: Callable[[Any], list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks, several requests to a pass, and draft heads in it; a stand-in computes what FlashInfer would."""
    fake: Any = fake_flashinfer.install(monkeypatch)
    monkeypatch.setattr("server.backend.device._check_flashinfer", lambda *args: None)
    with triton_takes("cpu"):
        engine = make_triton_engine(
            checkpoint, mtp_step=2, chunked_prefill_size=16, attention_backend="flashinfer", gdn_backend="flashinfer"
        )
        assert generate(engine, PROMPTS, EACH) == plain(EACH)
    calls = [name for name, _, _ in fake.calls]
    assert calls.count("run") > 3 and calls.count("chunk_gated_delta_rule") > 6
