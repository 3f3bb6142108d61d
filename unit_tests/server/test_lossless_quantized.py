"""Few bits change what a model says; drafts, chunks and company do not."""

from pathlib import Path

import pytest

from server.config import DEMO_MODEL
from server.llm import LLM
from server.messages import SamplingParams
from unit_tests.checkpoints import make_checkpoint
from unit_tests.server.engines import generate, make_engine, make_prompts

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
SEEDED = SamplingParams(temperature=1, max_tokens=20, ignore_eos=True, seed=11)
PROMPTS = make_prompts(12, 130, 256, seed=4)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("moe", [False, True])
def test_tokens_do_not_depend_on_drafts_or_company(tmp_path: Path, moe: bool, quantization: str) -> None:
    directory = make_checkpoint(tmp_path, moe=moe, num_layers=4, close_draft=True)
    plain = make_engine(directory, quantization=quantization)
    drafting = make_engine(directory, quantization=quantization, mtp_step=3, max_running_requests=3)
    for params in (GREEDY, SEEDED):
        assert generate(drafting, PROMPTS, params) == generate(plain, PROMPTS, params)
    accepted = drafting.scheduler.counters.accepted_per_position
    assert len(accepted) == 3 and min(accepted) > 0


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_demo_says_the_same_with_and_without_drafts(quantization: str) -> None:
    prompt = "Question: Tom has 31 apples. Mia gives them 7 more. How many apples does Tom have now?\nAnswer:"
    params = SamplingParams(temperature=0, max_tokens=40)
    plain, drafting = (
        LLM(model=DEMO_MODEL, quantization=quantization, mtp_step=mtp_step, speculation="fixed").generate(
            [prompt], params
        )[0]
        for mtp_step in (0, 3)
    )
    assert plain.token_ids == drafting.token_ids and drafting.num_accepted > 0
    assert "38" in plain.text
