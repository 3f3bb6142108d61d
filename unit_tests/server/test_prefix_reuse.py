"""How much of what was computed is reused: shared system prompts, shifted ones, conversations, and why not."""

import random
from pathlib import Path

import pytest

from server.engine import Engine
from server.messages import Generate, SamplingParams, TokenOutput
from unit_tests.checkpoints import IM_START, make_checkpoint
from unit_tests.server.engines import make_engine

SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
PAGE_SIZE = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("reuse"), num_layers=4, close_draft=True)


def make_cached_engine(checkpoint: Path, **settings: object) -> Engine:
    defaults = {"prefix_cache": "on", "overlap": "on", "max_model_len": 1200, "max_running_requests": 16, "mtp_step": 1}
    return make_engine(checkpoint, dtype="float32", **defaults | settings)


def serve(engine: Engine, prompts: list[list[int]], params: SamplingParams = SHORT) -> list[TokenOutput]:
    """All prompts at once; each one's last message."""
    for index, prompt in enumerate(prompts):
        engine.add(Generate(str(index), prompt, params))
    last: dict[str, TokenOutput] = {}
    while engine.has_work():
        for output in engine.step():
            assert isinstance(output, TokenOutput)
            last[output.request_id] = output
    return [last[str(index)] for index in range(len(prompts))]


def random_ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(256) for _ in range(count)]


def test_a_prompt_whose_reuse_would_take_the_room_it_needs_is_computed_anew(checkpoint: Path) -> None:
    """There are pages for one longest request, and what it shares with the one before it ends inside a page."""
    engine = make_cached_engine(checkpoint, max_model_len=202, max_running_requests=1, overlap="off")
    first, params = random_ids(random.Random(3), 135), SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    (output,) = serve(engine, [first], params)
    again = first + output.token_ids + random_ids(random.Random(4), 64)
    engine.add(Generate("again", again, params))
    for _ in range(20):
        engine.step()
    assert not engine.has_work()


@pytest.mark.parametrize("num_at_once", [1, 16, 64])
def test_64_requests_with_one_system_prompt_and_the_same_shifted_reach_what_full_attention_would(
    checkpoint: Path, num_at_once: int
) -> None:
    """A cache of attention alone would reuse the shared pages for all requests but the first."""
    rng = random.Random(1)
    engine, system = make_cached_engine(checkpoint), random_ids(rng, 700)
    for shared in (system, random_ids(rng, 100) + system):
        best = 63 * (len(shared) // PAGE_SIZE * PAGE_SIZE)
        prompts = [shared + random_ids(rng, 30) for _ in range(64)]
        groups = [prompts[start : start + num_at_once] for start in range(0, 64, num_at_once)]
        outputs = [output for group in groups for output in serve(engine, group)]
        assert sum(output.num_cached for output in outputs) >= 0.9 * best
        assert sum(output.num_cached > 0 for output in outputs) >= 0.9 * 63


@pytest.mark.parametrize(("mtp_step", "with_turns"), [(0, False), (3, False), (3, True)])
def test_from_the_second_turn_on_a_conversation_reuses_its_prompt_and_answer(
    checkpoint: Path, mtp_step: int, with_turns: bool
) -> None:
    engine, rng = make_cached_engine(checkpoint, mtp_step=mtp_step), random.Random(2)
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    before: list[int] = []
    for turn in range(8):
        begin = [IM_START] if with_turns else []
        prompt = [*before, *begin, *random_ids(rng, 60 if turn == 0 else 25), *begin, 7, 8]
        engine.add(Generate("chat", prompt, params))
        outputs: list[TokenOutput] = []
        while engine.has_work():
            outputs += engine.step()  # type: ignore[arg-type]
        answer = [token for output in outputs for token in output.token_ids]
        assert len(answer) == 50
        if turn:
            assert outputs[-1].num_cached >= 0.95 * len(before)
            assert outputs[-1].num_cached == len(before) - 1, "all but the token that no step was run on"
        before = prompt + answer


def test_a_stop_token_inside_an_accepted_run_leaves_a_checkpoint_right_before_it(checkpoint: Path) -> None:
    rng = random.Random(3)
    prompts = [random_ids(rng, 70 + 3 * index) for index in range(8)]
    plain = make_engine(checkpoint, dtype="float32", mtp_step=0, max_model_len=1200)
    endless = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    for prompt in prompts:
        plain.add(Generate("plain", prompt, endless))
        tokens: list[int] = []
        while plain.has_work():
            tokens += [token for output in plain.step() for token in output.token_ids]  # type: ignore[union-attr]
        stop_id = tokens[12]
        answer = tokens[: tokens.index(stop_id) + 1]
        engine = make_cached_engine(checkpoint, mtp_step=4)
        serve(engine, [prompt], SamplingParams(temperature=0, max_tokens=30, stop_token_ids=(stop_id,)))
        (output,) = serve(engine, [prompt + answer + [1, 2, 3]])
        assert output.num_cached == len(prompt) + len(answer) - 1


def test_every_miss_has_its_reason(checkpoint: Path) -> None:
    engine, rng = make_cached_engine(checkpoint), random.Random(4)
    misses = engine.scheduler.cache.counters.misses
    prompt = random_ids(rng, 200)
    for prompts, reason in (
        ([[5]], "too short"),
        ([prompt], "unseen"),
        ([prompt[:150]], "no checkpoint"),
    ):
        num_before = misses[reason]
        serve(engine, prompts)
        assert misses[reason] == num_before + 1
    (output,) = serve(engine, [prompt[:150]])
    assert output.num_cached == 144, "the second request that branches off there leaves a checkpoint"
    disabled = make_cached_engine(checkpoint, prefix_cache="off")
    serve(disabled, [prompt])
    assert disabled.scheduler.cache.counters.misses["disabled"] == 1


def test_a_chat_prompt_leaves_checkpoints_at_the_end_of_the_system_prompt_and_before_the_answer(
    checkpoint: Path,
) -> None:
    engine, rng = make_cached_engine(checkpoint), random.Random(6)
    assert engine.runner.turn_ids == {IM_START}
    system, question = [IM_START, *random_ids(rng, 200)], [IM_START, *random_ids(rng, 90)]
    serve(engine, [[*system, *question, IM_START, 3, 4]])
    (other, again) = serve(engine, [[*system, IM_START, *random_ids(rng, 80)], [*system, *question, IM_START, 3, 4]])
    assert other.num_cached == len(system) // PAGE_SIZE * PAGE_SIZE
    assert again.num_cached == len(system + question) // PAGE_SIZE * PAGE_SIZE


def test_long_prompts_leave_a_checkpoint_every_so_many_tokens(checkpoint: Path) -> None:
    engine, rng = make_cached_engine(checkpoint, checkpoint_interval=256), random.Random(7)
    prompt = random_ids(rng, 1100)
    serve(engine, [prompt])
    for length, expected in ((300, 256), (700, 512), (1024, 768), (1099, 1024)):
        (output,) = serve(engine, [prompt[:length] + [1]])
        assert output.num_cached >= expected
