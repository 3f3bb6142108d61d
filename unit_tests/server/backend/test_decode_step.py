"""The device's decode step against the engine's own passes on the CPU: the same tokens under every setting, whatever
drafts are proposed. Interpreted."""

from pathlib import Path
from typing import Any

import pytest

from kernels.gpu.dispatch import triton_takes
from server.backend.decode_step import DecodeStep
from server.backend.request_table import RuleColumns
from server.engine import Engine
from server.messages import SamplingParams
from unit_tests.checkpoints import make_checkpoint
from unit_tests.server.engines import generate, make_engine, make_prompts, run, tokens_of

PROMPTS = make_prompts(3, 8, 256, seed=7)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("step"), num_layers=4, close_draft=True)


def make_triton_engine(checkpoint: Path, **settings: Any) -> Engine:
    engine = make_engine(checkpoint, dtype="float32", max_running_requests=4, **settings)
    assert isinstance(engine.runner.decode, DecodeStep)
    return engine


@pytest.mark.slow
def test_sampling_rules_penalties_and_logprobs_are_the_cpus(checkpoint: Path) -> None:
    """Penalties count drafts and outputs, biases and min_tokens reach the draw, raw log-probabilities come back."""
    mixed = [
        SamplingParams(temperature=0, repetition_penalty=1.4, frequency_penalty=0.5, max_tokens=6, logprobs=2),
        SamplingParams(temperature=0, logit_bias={7: 30.0, 9: -5.0}, min_tokens=4, max_tokens=6, logprobs=1),
        SamplingParams(temperature=0.8, top_k=5, top_p=0.9, seed=3, max_tokens=6, ignore_eos=True),
    ]
    expected = run(make_engine(checkpoint, dtype="float32"), PROMPTS, mixed)
    with triton_takes("cpu"):
        messages = run(make_triton_engine(checkpoint, mtp_step=2), PROMPTS, mixed)
    assert tokens_of(messages) == tokens_of(expected)
    for one, other in zip(messages, expected, strict=True):
        entries, wanted = ([entry for message in each for entry in message.logprobs] for each in (one, other))
        assert [entry.top_ids for entry in entries] == [entry.top_ids for entry in wanted]
        for entry, law in zip(entries, wanted, strict=True):
            assert entry.logprob == pytest.approx(law.logprob, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("moe", "mtp_layers", "mtp_step"), [(True, 1, 1), (False, 2, 3)])
def test_sparse_models_and_chained_layers_give_the_same_tokens(
    tmp_path: Path, moe: bool, mtp_layers: int, mtp_step: int
) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    checkpoint = make_checkpoint(tmp_path, moe=moe, num_layers=4, mtp_layers=mtp_layers, close_draft=True)
    expected = generate(make_engine(checkpoint, dtype="float32"), PROMPTS[:2], params)
    with triton_takes("cpu"):
        engine = make_triton_engine(checkpoint, mtp_step=mtp_step)
        assert generate(engine, PROMPTS[:2], params) == expected
    assert engine.scheduler.counters.num_accepted > 0


def test_rule_columns_hold_the_newest_requests_rules_only() -> None:
    columns = RuleColumns.allocate(3, 5, "cpu")
    columns.write(1, SamplingParams(logit_bias={4: 1.5, 2: -1.0}, min_tokens=3), [8, 9])
    assert columns.has_any.tolist() == [False, True, False]
    assert columns.bias_ids[1, :3].tolist() == [4, 2, -1] and columns.bias_values[1, :2].tolist() == [1.5, -1.0]
    assert columns.banned_ids[1].tolist() == [8, 9, -1, -1, -1]
    columns.write(1, SamplingParams(), [8])
    assert not columns.has_any.any() and (columns.bias_ids[1] == -1).all()
    assert columns.banned_ids[1].tolist() == [8, -1, -1, -1, -1]
