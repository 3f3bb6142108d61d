"""The whole model with FlashInfer's prefill between Triton's verify steps equals the law; a stand-in computes."""

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from kernels.gpu.attention import SplitScratch
from kernels.gpu.dispatch import triton_takes
from kernels.gpu.flashinfer import AttentionPlanner
from models.cache import Backends
from models.qwen3_5.model import Qwen35
from models.qwen3_5_mtp.model import Qwen35MTP
from unit_tests.checkpoints import make_checkpoint
from unit_tests.kernels.gpu import fake_flashinfer
from unit_tests.models.cached_run import PAGE_SIZE, CachedRun
from unit_tests.models.loading import draw_ids, load_ours, max_error

MAX_LEN = 64


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Qwen35, Qwen35MTP]:
    return load_ours(make_checkpoint(tmp_path_factory.mktemp("flashinfer"), num_layers=4))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module = fake_flashinfer.install(monkeypatch)
    with torch.inference_mode():
        yield module


def make_run(models: tuple[Qwen35, Qwen35MTP], backends: Backends) -> CachedRun:
    run = CachedRun(*models, max_len=MAX_LEN)
    config = models[0].config
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    scratch = SplitScratch.allocate(5, *heads, MAX_LEN, 4, "cpu")
    planner = AttentionPlanner(*heads, PAGE_SIZE, torch.float32, "cpu") if backends.attention == "flashinfer" else None
    run.cache = replace(run.cache, backends=backends, scratch=scratch, planner=planner)
    return run


def count(fake: ModuleType, name: str) -> int:
    return sum(call[0] == name for call in fake.calls)


@pytest.mark.parametrize("attention", ["triton", "flashinfer"])
@pytest.mark.parametrize("gdn", ["triton", "flashinfer"])
def test_prefill_verify_and_prefill_again_give_the_states_of_whole_sequences(
    models: tuple[Qwen35, Qwen35MTP], fake: ModuleType, attention: str, gdn: str
) -> None:
    target, _ = models
    sequences = [draw_ids(length, seed=length).tolist() for length in (25, 14)]
    law = [target.forward_sequence(torch.tensor([ids]))[0] for ids in sequences]
    run = make_run(models, Backends(attention, gdn))
    with triton_takes("cpu"):
        _, first = run.prefill([3, 1], [sequences[0][:17], sequences[1][:5]])
        _, guessed = run.verify([3, 1], [sequences[0][17:20], [*sequences[1][5:7], 0]])
        run.accept([3, 1], [3, 2])
        _, last = run.prefill([3, 1], [sequences[0][20:], sequences[1][7:]])
    assert max_error(first, torch.cat([law[0][:17], law[1][:5]])) < 1e-4
    assert max_error(guessed[:5], torch.cat([law[0][17:20], law[1][5:7]])) < 1e-4
    assert max_error(last, torch.cat([law[0][20:], law[1][7:]])) < 1e-4
    num_delta, num_full = 3, 1
    assert count(fake, "chunk_gated_delta_rule") == (2 * num_delta if gdn == "flashinfer" else 0)
    assert count(fake, "run") == (2 * num_full if attention == "flashinfer" else 0)


def test_a_draft_head_shares_the_plan_and_its_single_tokens_are_tritons(
    models: tuple[Qwen35, Qwen35MTP], fake: ModuleType
) -> None:
    _, draft = models
    results = []
    for backends in (Backends("triton", "triton"), Backends("flashinfer", "flashinfer")):
        run = make_run(models, backends)
        num_plans = count(fake, "plan")
        with triton_takes("cpu"):
            forward, hidden = run.prefill([2, 4], [draw_ids(9, seed=1).tolist(), draw_ids(6, seed=2).tolist()])
            after = draft(draw_ids(15, seed=3), hidden, forward)
            ahead = forward.next_tokens(torch.tensor([7, 8]), torch.tensor([9, 6]))
            results.append([after, draft(ahead.token_ids, after[[8, 14]], ahead)])
        assert count(fake, "plan") - num_plans == (backends.attention == "flashinfer")
    assert count(fake, "run") == 2, "the target's layer and the draft's"
    assert all(max_error(one, other) < 1e-4 for one, other in zip(*results, strict=True))
