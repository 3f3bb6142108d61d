"""Weights that were updated in place are those of a cold start, token for token, on every way through the models."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from models.weight_transfer.disk import stage_directory
from models.weight_transfer.wire import encode_delta
from server.llm import LLM, SamplingParams
from unit_tests.checkpoints import make_checkpoint
from unit_tests.models.sessions import describe

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = [list(range(5, 60)), [7, 8, 9] * 20, [300]]


def make_llm(checkpoint: Path, **settings: Any) -> LLM:
    defaults: dict[str, Any] = {"speculation": "fixed", "max_model_len": 256, "num_threads": 1}
    return LLM(model=str(checkpoint), **defaults | settings)


def outputs(llm: LLM) -> list[tuple[list[int], int, int]]:
    """Tokens, and proposed and accepted drafts, which tell whether the draft head is new, too."""
    made = llm.generate(PROMPTS, GREEDY)
    return [(output.token_ids, output.num_proposed, output.num_accepted) for output in made]


def update(llm: LLM, old: Path, new: Path, is_delta: bool) -> None:
    before, after = (load_file(path / "model.safetensors") for path in (old, new))
    session = llm.engine.runner.store.begin(tensors=describe(after), is_delta=is_delta, needs_mtp=True)
    if is_delta:
        for name, tensor in after.items():
            session.add_delta(name, *encode_delta(before[name], tensor))
    else:
        stage_directory(new, session)
    session.prepare()
    session.commit()
    session.close()
    llm.engine.flush_cache()


@pytest.mark.parametrize("decoder", ["c++", "torch"])
@pytest.mark.parametrize("mtp_step", [0, 3])
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize(
    ("dtype", "quantization", "is_delta"),
    [
        ("bfloat16", "none", False),
        ("bfloat16", "none", True),
        ("float32", "none", True),
        ("bfloat16", "int8", False),
        ("float32", "int4", False),
    ],
)
def test_greedy_output_after_an_update_is_that_of_a_cold_start(
    dtype: str,
    quantization: str,
    is_delta: bool,
    moe: bool,
    mtp_step: int,
    decoder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if decoder == "torch":
        monkeypatch.setattr("models.layers.cpu_decoder.serves", lambda weight: False)
    old, new = (
        make_checkpoint(tmp_path / str(seed), num_layers=4, moe=moe, seed=seed, dtype=dtype, close_draft=True)
        for seed in range(2)
    )
    settings = {"mtp_step": mtp_step, "dtype": dtype, "quantization": quantization}
    expected = [outputs(make_llm(path, **settings)) for path in (old, new)]
    assert expected[0] != expected[1]
    llm = make_llm(old, **settings)
    assert outputs(llm) == expected[0]
    update(llm, old, new, is_delta)
    assert outputs(llm) == expected[1]
    update(llm, new, old, is_delta)
    assert outputs(llm) == expected[0]
