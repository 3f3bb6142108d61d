from pathlib import Path

import pytest
from torch import Tensor

from server.errors import ConfigError, InvalidRequest
from server.messages import Generate, SamplingParams
from unit_tests.checkpoints import ENDOFTEXT, IM_END, make_checkpoint
from unit_tests.server.engines import assert_nothing_left, generate, make_engine, make_prompts, run

PROMPTS = make_prompts(12, 60, 256, seed=5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("engine"), num_layers=4, close_draft=True)


def test_a_stop_inside_an_accepted_run_cuts_there_and_max_tokens_is_exact(checkpoint: Path) -> None:
    endless = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    plain = generate(make_engine(checkpoint), PROMPTS, endless)
    engine = make_engine(checkpoint, mtp_step=4)
    for limit in (1, 2, 3, 7):
        params = SamplingParams(temperature=0, max_tokens=limit, ignore_eos=True)
        assert generate(engine, PROMPTS, params) == [tokens[:limit] for tokens in plain]
    for tokens, prompt in zip(plain, PROMPTS, strict=True):
        stop_id = tokens[9]
        (messages,) = run(engine, [prompt], SamplingParams(temperature=0, max_tokens=30, stop_token_ids=(stop_id,)))
        got = [token for message in messages for token in message.token_ids]
        assert got == tokens[: tokens.index(stop_id) + 1]
        assert messages[-1].finish_reason == "stop" and messages[-1].stop_token_id == stop_id


@pytest.mark.parametrize("mtp_step", [0, 2])
def test_the_output_head_runs_for_chunks_that_end_a_prompt_only(checkpoint: Path, mtp_step: int) -> None:
    engine = make_engine(checkpoint, mtp_step=mtp_step, chunked_prefill_size=20)
    target, num_rows = engine.runner.target, list[int]()
    compute_logits = target.compute_logits

    def count(hidden: Tensor) -> Tensor:
        num_rows.append(len(hidden))
        return compute_logits(hidden)

    target.compute_logits = count  # type: ignore[method-assign]
    asked = SamplingParams(temperature=0.5, seed=1, max_tokens=1, logprobs=2, repetition_penalty=1.2)
    (messages,) = run(engine, [list(range(70))], asked)
    assert num_rows == [1], "the fourth chunk's last token"
    assert len(messages) == 1 and len(messages[0].logprobs) == 1
    del target.compute_logits
    assert messages[0].token_ids == generate(make_engine(checkpoint), [list(range(70))], asked)[0]


def test_both_stop_ids_of_the_checkpoint_end_a_request(checkpoint: Path) -> None:
    engine = make_engine(checkpoint, mtp_step=1)
    assert set(engine.ready.eos_token_ids) == {IM_END, ENDOFTEXT}
    for eos_id in engine.ready.eos_token_ids:
        params = SamplingParams(temperature=0, max_tokens=30, logit_bias={eos_id: 100.0})
        (messages,) = run(engine, PROMPTS[:1], params)
        assert messages[-1].token_ids == [eos_id] and messages[-1].finish_reason == "stop"
        assert messages[-1].stop_token_id is None


def test_min_tokens_holds_back_every_stop_id_at_every_verify_row(checkpoint: Path) -> None:
    params = SamplingParams(
        temperature=0, max_tokens=30, min_tokens=6, stop_token_ids=(7,), logit_bias={7: 100.0, IM_END: 90.0}
    )
    for mtp_step in (0, 1, 4):
        (messages,) = run(make_engine(checkpoint, mtp_step=mtp_step), PROMPTS[:1], params)
        tokens = [token for message in messages for token in message.token_ids]
        assert len(tokens) == 7 and tokens[-1] == 7 and IM_END not in tokens


def test_requests_end_at_the_context_limit(checkpoint: Path) -> None:
    engine = make_engine(checkpoint, mtp_step=3, max_model_len=40)
    (messages,) = run(engine, [list(range(30))], SamplingParams(temperature=0, ignore_eos=True))
    assert sum(len(message.token_ids) for message in messages) == 10
    assert messages[-1].finish_reason == "length"


def test_an_aborted_request_frees_its_pages_before_the_next_step(checkpoint: Path) -> None:
    engine = make_engine(checkpoint, mtp_step=1)
    for name in ("kept", "gone", "waiting"):
        engine.add(Generate(name, PROMPTS[0], SamplingParams(max_tokens=50, ignore_eos=True)))
    engine.step()
    engine.step()
    engine.abort("gone")
    engine.abort("gone")
    engine.abort("waiting")
    assert engine.stats().num_running == 1
    engine.abort("kept")
    assert_nothing_left(engine)
    assert engine.step() == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ([1] * 320, "maximum context length is 320"), ([-1], "0..319"), ([320], "0..319")],
)
def test_prompts_that_cannot_be_served_are_refused(checkpoint: Path, prompt: list[int], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make_engine(checkpoint).add(Generate("bad", prompt, SamplingParams()))


def test_counts_of_drafts_add_up(checkpoint: Path) -> None:
    engine = make_engine(checkpoint, mtp_step=2)
    messages = run(engine, PROMPTS, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    stats = engine.stats()
    last = [one[-1] for one in messages]
    assert stats.num_output_tokens == 20 * len(PROMPTS)
    assert stats.num_prompt_tokens == sum(map(len, PROMPTS))
    assert stats.num_proposed == sum(message.num_proposed for message in last)
    assert stats.num_accepted == sum(message.num_accepted for message in last) == sum(stats.accepted_per_position)
    # Every token but the prompt's first one came from a verify step: one each, plus the accepted drafts, less the
    # bonus of steps that were cut after an accepted draft.
    assert 0 <= stats.num_verify_steps + stats.num_accepted - 19 * len(PROMPTS) <= len(PROMPTS)


def test_settings_that_do_not_fit_are_refused_with_the_mend(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--max-total-tokens 64 .* needs with --mtp-step 2: 320"):
        make_engine(checkpoint, mtp_step=2, max_model_len=300, max_total_tokens=64)
    with pytest.raises(ConfigError, match="at most 4096 positions"):
        make_engine(checkpoint, max_model_len=5000)
    with pytest.raises(ConfigError, match=r"--mtp-step is 9, the range is 0\.\.8"):
        make_engine(checkpoint, mtp_step=9)
    headless = make_checkpoint(tmp_path, num_layers=4, mtp_layers=0)
    with pytest.raises(ConfigError, match="--mtp-step 0"):
        make_engine(headless, mtp_step=1)


def test_memory_per_request_does_not_depend_on_mtp_step_but_for_the_rings(checkpoint: Path) -> None:
    caches = [make_engine(checkpoint, mtp_step=k).runner.table.cache.gdn for k in (0, 1, 4, 8)]
    assert len({cache.state_bytes_per_row for cache in caches}) == 1
    assert [cache.ring.k.shape[2] for cache in caches] == [2, 4, 16, 32]
    assert [cache.conv_ring.shape[2] for cache in caches] == [4, 8, 8, 16]
