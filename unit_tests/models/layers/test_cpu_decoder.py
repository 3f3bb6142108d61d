"""The C++ decoder against the torch loop it stands beside, through histories of ragged verify steps."""

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.cpu.library import load_library
from kernels.sampling import draw
from models.cache import History
from models.layers import cpu_decoder
from models.qwen3_5.model import Qwen35
from models.qwen3_5_mtp.model import Qwen35MTP
from unit_tests import checkpoints
from unit_tests.checkpoints import make_checkpoint
from unit_tests.models.cached_run import CachedRun
from unit_tests.models.loading import load_ours

pytestmark = pytest.mark.skipif(load_library() is None, reason="this machine has no C++ compiler")

ROWS = (3, 1, 4)
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-4}
Models = tuple[Qwen35, Qwen35MTP]


@pytest.fixture(scope="module", params=["dense", "moe", "wide"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`wide`: states whose rows are several vectors, and a rest."""
    path = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "wide":
            patch.setattr(checkpoints, "DELTA_VALUE_DIM", 72)
        return make_checkpoint(path, moe=request.param == "moe", num_layers=4, dtype="float64")


def load(directory: Path, dtype: torch.dtype, quantization: str = "none") -> Models:
    target, draft = load_ours(directory, dtype, mtp=True, quantization=quantization)
    assert draft is not None
    return target, draft


@contextmanager
def law() -> Iterator[None]:
    """Everything by the torch code."""
    original = cpu_decoder.serves
    cpu_decoder.serves = lambda weight: False
    try:
        yield
    finally:
        cpu_decoder.serves = original


def run_history(models: Models, widest: int) -> tuple[CachedRun, list[Tensor]]:
    """Prompts, then verify steps of random widths and accept lengths with known tokens in between; the draft head runs
    over the same rows."""
    rng, outputs = random.Random(0), []
    run = CachedRun(*models, max_len=120, mtp_step=widest - 1)
    run.prefill(ROWS, [[rng.randrange(256) for _ in range(5 + row)] for row in ROWS])
    for step in range(9):
        is_known = step in (3, 4, 7)
        widths = [rng.choice([1, 2, 11, 17]) if is_known else rng.randint(1, widest) for _ in ROWS]
        tokens = [[rng.randrange(256) for _ in range(width)] for width in widths]
        forward, hidden = (run.prefill if is_known else run.verify)(ROWS, tokens)
        outputs += [hidden, models[1](torch.roll(forward.token_ids, -1), hidden, forward)]
        if not is_known:
            run.accept(ROWS, [rng.randint(1, width) for width in widths])
    run.fold(ROWS)
    return run, outputs


def memory_of(run: CachedRun) -> list[Tensor]:
    gdn = run.cache.gdn
    return [run.cache.kv.data, gdn.state, gdn.conv_ring, *gdn.ring]


@torch.inference_mode()
@pytest.mark.parametrize("widest", [1, 2, 4, 9])
@pytest.mark.parametrize("dtype", [*TOLERANCES, torch.bfloat16])
def test_a_history_of_ragged_steps_equals_the_law(directory: Path, dtype: torch.dtype, widest: int) -> None:
    models = load(directory, dtype)
    run, outputs = run_history(models, widest)
    with law():
        law_run, expected = run_history(models, widest)
    for mine, theirs in zip(outputs, expected, strict=True):
        assert mine.dtype == dtype and mine.isfinite().all()
        assert_close(mine, theirs, dtype)
    for mine, theirs in zip(memory_of(run), memory_of(law_run), strict=True):  # the padding is NaN, and stays
        assert_close(mine, theirs, dtype)


@torch.inference_mode()
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_layers_equal_the_law(directory: Path, quantization: str) -> None:
    """In float64 next to no number is rounded to another one of 8 bits; products are summed in float32."""
    models = load(directory, torch.float64, quantization)
    run, outputs = run_history(models, 4)
    with law():
        law_run, expected = run_history(models, 4)
    for mine, theirs in zip([*outputs, *memory_of(run)], [*expected, *memory_of(law_run)], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)


def assert_close(mine: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    if dtype in TOLERANCES:
        torch.testing.assert_close(mine, theirs, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype], equal_nan=True)
        return
    # Rounding may send a token to another expert: single numbers may be far off, most are near.
    assert torch.equal(mine.isnan(), theirs.isnan())
    assert (mine - theirs).abs().nanmean() < 0.05 * theirs.abs().nanmean()


@torch.inference_mode()
def test_the_law_really_is_another_way(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = load(directory, torch.float64)
    calls: list[int] = []
    run = cpu_decoder.Decoder.run
    monkeypatch.setattr(cpu_decoder.Decoder, "run", lambda *args: calls.append(1) or run(*args))
    run_history(models, 3)
    assert len(calls) == 20, "ten passes of the target, a fold, and nine of its draft"
    with law():
        run_history(models, 3)
    assert len(calls) == 20


@torch.inference_mode()
@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [(torch.float32, "none"), (torch.bfloat16, "none"), (torch.bfloat16, "int8"), (torch.float32, "int4")],
)
def test_a_row_gives_the_same_bits_in_any_company_and_with_any_threads(
    directory: Path, dtype: torch.dtype, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = load(directory, dtype, quantization)
    monkeypatch.setattr("kernels.cpu.decoder._PARALLEL_PRODUCTS", 0)
    tokens = {row: [random.Random(row).randrange(256) for _ in range(3)] for row in ROWS}

    def step(rows: tuple[int, ...], num_threads: int) -> dict[int, Tensor]:
        monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
        run = CachedRun(*models, max_len=80)
        for row in ROWS:
            run.prefill([row], [list(range(row, row + 9))])
        _, hidden = run.verify(rows, [tokens[row] for row in rows])
        return dict(zip(rows, hidden.view(len(rows), 3, -1), strict=True))

    together = step(ROWS, 3)
    for row in ROWS:
        assert torch.equal(step((row,), 1)[row], together[row])


@torch.inference_mode()
def test_tokens_and_lengths_may_come_as_columns_of_larger_tables(directory: Path) -> None:
    target, _ = load(directory, torch.float64)
    run, other = (CachedRun(target, max_len=80) for _ in "ab")
    for one in (run, other):
        one.prefill(ROWS, [[1, 2, 3]] * 3)
    forward = run.batch(ROWS, [[7], [8], [9]], is_verify=True)
    expected = target(other.batch(ROWS, [[7], [8], [9]], is_verify=True))
    table = torch.stack([forward.token_ids, torch.full((3,), 5)], dim=1)
    object.__setattr__(forward, "token_ids", table[:, 0])
    assert not forward.token_ids.is_contiguous() and torch.equal(target(forward), expected)


@torch.inference_mode()
def test_weights_updated_in_place_are_seen_and_moved_ones_too(directory: Path) -> None:
    target, _ = load(directory, torch.float32)

    def step() -> Tensor:
        run = CachedRun(target, max_len=80)
        return run.verify([2], [[3, 1, 4]])[1]

    before = step()
    target.layers[0].mixer.in_proj.weight.mul_(1.5)
    changed = step()
    assert not torch.equal(before, changed)
    target.double()
    torch.testing.assert_close(step().float(), changed, rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_single_weights_that_moved_are_found_once_the_old_places_are_forgotten(directory: Path) -> None:
    models = load(directory, torch.float64)
    _, expected = run_history(models, 3)
    for weight in (models[0].layers[0].mixer.in_proj.weight, models[1].layers[0].mixer.out.weight):
        moved, old = weight.data.clone(), weight.data
        weight.data = moved
        old.fill_(torch.nan)
    for model in models:
        model.forget_addresses()
    _, outputs = run_history(models, 3)
    assert all(torch.equal(mine, before) for mine, before in zip(outputs, expected, strict=True))


@torch.inference_mode()
def test_a_verify_pass_records_its_rows_for_the_draft_head_either_way(directory: Path) -> None:
    target, draft = load(directory, torch.float32)
    kept: list[History] = []
    for _ in range(2):
        run = CachedRun(target, draft, max_len=80)
        history = History.allocate(target.config, 5, torch.float32, "cpu")
        object.__setattr__(run.cache, "history", history)
        run.prefill(ROWS, [[1] * 30, [2] * 31, [3] * 4])
        _, hidden = run.verify(ROWS, [[5, 6, 7], [8], [9, 10]])
        row, position = 3, 31  # row 3 began at 30: slots 30, 31 and, once round, 0
        assert history.token_ids[row, [30, 31, 0]].tolist() == [5, 6, 7] and history.token_ids[1, 31] == 8
        assert torch.equal(history.hidden[row, position], hidden[1])
        kept.append(history)
        run.accept(ROWS, [1, 1, 1])
        if len(kept) == 1:
            original, cpu_decoder.serves = cpu_decoder.serves, lambda weight: False
    cpu_decoder.serves = original
    torch.testing.assert_close(kept[0].hidden, kept[1].hidden, rtol=1e-4, atol=1e-4)
    assert torch.equal(kept[0].token_ids, kept[1].token_ids)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [(torch.float64, "none"), (torch.float32, "none"), (torch.bfloat16, "none"), (torch.bfloat16, "int4")],
)
def test_chunks_and_a_verify_in_one_pass_are_those_of_two_bit_for_bit(
    directory: Path, dtype: torch.dtype, quantization: str
) -> None:
    """Their page tables are of different widths."""
    target, draft = load(directory, dtype, quantization)
    outputs, memories = [], []
    for is_joint in (True, False):
        run = CachedRun(target, draft, max_len=120)
        history = History.allocate(target.config, 5, dtype, "cpu")
        object.__setattr__(run.cache, "history", history)
        run.prefill([1, 4, 3], [[1] * 6, [2] * 9, [3] * 31])
        run.verify([1, 4], [[5, 6], [8]])
        run.accept([1, 4], [2, 1])
        chunks = run.batch([3, 2], [[7] * 20, [9] * 11], is_verify=False)
        guesses = run.batch([4, 1], [[5, 6, 7], [8]], is_verify=True)
        assert chunks.view is not None and guesses.view is not None
        object.__setattr__(guesses.view, "page_table", guesses.view.page_table[:, :4])
        passes = [chunks, guesses]
        outputs.append(target.forward_jointly(passes) if is_joint else [target(forward) for forward in passes])
        memories.append([*memory_of(run), history.hidden, history.token_ids])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*outputs, strict=True))
    for mine, theirs in zip(*memories, strict=True):
        assert torch.equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0))


@torch.inference_mode()
def test_passes_are_joined_where_the_kernel_runs_only(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, _ = load(directory, torch.float64)
    assert target.max_joint_tokens == 2**31 // target._cpu_decoder._packed().num_products > 0
    calls, joined = list[int](), cpu_decoder.Decoder.run
    monkeypatch.setattr(cpu_decoder.Decoder, "run", lambda *args: calls.append(1) or joined(*args))

    def run_both() -> list[Tensor]:
        run = CachedRun(target, max_len=80)
        run.prefill([1], [[1] * 6])
        prompt, step = run.batch([2], [[7] * 5], is_verify=False), run.batch([1], [[5]], is_verify=True)
        return target.forward_jointly([prompt, step])

    together = run_both()
    assert len(calls) == 2, "the prompt's pass and the joint one"
    with law():
        assert target.max_joint_tokens == 0
        for mine, theirs in zip(together, run_both(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)
    assert len(calls) == 2


@torch.inference_mode()
def test_known_rows_take_the_same_way_if_they_are_few(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = load(directory, torch.float64)
    run = CachedRun(*models, max_len=80)
    forward = run.batch([1, 2], [[1, 2, 3, 4], [5] * 40], is_verify=False)
    assert models[0]._cpu_decoder.serves(forward) and models[1].can_propose(forward)
    num_products = models[0]._cpu_decoder._packed().num_products
    monkeypatch.setattr(cpu_decoder, "_MAX_KNOWN_ROWS", 43)
    assert models[0]._cpu_decoder.serves(forward)
    monkeypatch.setattr(cpu_decoder, "_MAX_PRODUCTS", 44 * num_products - 1)
    assert not models[0]._cpu_decoder.serves(forward)
    monkeypatch.setattr(cpu_decoder, "_MAX_KNOWN_ROWS", 44)
    assert models[0]._cpu_decoder.serves(forward)


@torch.inference_mode()
def test_a_head_that_catches_up_on_many_rows_takes_it_too(directory: Path) -> None:
    target, draft = load(directory, torch.float32)
    run = CachedRun(target, draft, max_len=80)
    assert draft.can_propose(run.batch([1, 2], [[1] * 17, [2]], is_verify=True))


@torch.inference_mode()
def test_logits_of_a_row_are_the_same_bits_among_many_rows(directory: Path) -> None:
    target, _ = load(directory, torch.bfloat16)
    hidden = torch.randn(150, target.config.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    together = target.compute_logits(hidden)
    assert all(torch.equal(target.compute_logits(hidden[[row]])[0], together[row]) for row in (0, 63, 64, 149))


def test_gradients_and_sequences_without_a_cache_take_the_torch_way(directory: Path) -> None:
    target, _ = load(directory, torch.float32)
    run = CachedRun(target, max_len=80)
    forward = run.batch([1], [[1, 2]], is_verify=True)
    with torch.enable_grad():
        assert not target._cpu_decoder.serves(forward)
    with torch.inference_mode():
        assert target._cpu_decoder.serves(forward)


@torch.inference_mode()
@pytest.mark.parametrize(("temperature", "quantization"), [(0.0, "none"), (1.3, "none"), (0.0, "int8"), (1.3, "int4")])
def test_a_chain_of_guesses_in_one_call_equals_its_steps(
    directory: Path, temperature: float, quantization: str
) -> None:
    """Requests come with most guesses first; each is drawn as kernels/sampling.py draws it."""
    target, draft = load(directory, torch.float64, quantization)
    seeds, temperatures = torch.tensor([5, -6, 7]), torch.tensor([temperature, 0.0, temperature])
    results = []
    for at_once in (True, False):
        run = CachedRun(target, draft, max_len=80)
        run.prefill(ROWS, [[1] * 6, [2] * 9, [3] * 4])
        forward, hidden = run.verify(ROWS, [[5, 6, 7], [8], [9, 10]])
        last, next_ids = torch.tensor([1, 3, 5]), torch.roll(forward.token_ids, -1)
        assert draft.can_propose(forward)
        if at_once:
            results.append(draft.propose(next_ids, hidden, forward, last, [3, 2, 1], temperatures, seeds))
            continue
        drafts, positions = torch.zeros(3, 3, dtype=torch.int64), forward.positions[last]
        state = draft(next_ids, hidden, forward)[last]
        for step, alive in enumerate((3, 2, 1)):
            state, none = state[:alive], torch.zeros(alive)
            filters = {"top_k": none.long(), "top_p": none + 1, "min_p": none}
            where = {"seeds": seeds[:alive], "positions": positions[:alive] + 2 + step}
            newest = draw(target.compute_logits(state), temperature=temperatures[:alive], **filters, **where)
            drafts[:alive, step] = newest
            ahead = forward.next_tokens(newest, positions[:alive] + 1 + step)
            state = draft(newest, state, ahead)
        results.append(drafts)
    wanted = [(request, step) for request, step in itertools.product(range(3), range(3)) if step < 3 - request]
    assert all(results[0][place] == results[1][place] for place in wanted)
