"""The dense target equals transformers, and the cache changes nothing whatever the steps."""

import random
from pathlib import Path

import pytest
import torch

from unit_tests.checkpoints import make_checkpoint
from unit_tests.models.cached_run import CachedRun
from unit_tests.models.equality import check_greedy_tokens_equal_transformers, check_logits_equal_transformers
from unit_tests.models.loading import draw_ids, load_ours, max_error


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def model64(tmp_path_factory: pytest.TempPathFactory):
    """Four layers in float64, where rounding hides nothing."""
    directory = make_checkpoint(tmp_path_factory.mktemp("four_layers"), num_layers=4)
    return load_ours(directory, torch.float64, mtp=False)[0]


@pytest.mark.parametrize("tied", ["outer", "inner", "no"])
@pytest.mark.parametrize("prefix", ["text", "vl", "language_model.model"])
def test_logits_equal_transformers_for_every_prefix_and_tie(prefix, tied, tmp_path):
    check_logits_equal_transformers(tmp_path, prefix=prefix, tied=tied, vision=prefix == "vl")


def test_200_greedy_tokens_equal_transformers(tmp_path):
    check_greedy_tokens_equal_transformers(make_checkpoint(tmp_path, num_layers=4))


def test_bfloat16_weights_serve_close_to_float32(checkpoint):
    ids = draw_ids(1, 40)
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = load_ours(checkpoint, dtype, mtp=False)
        logits[dtype] = model.compute_logits(model.forward_sequence(ids))
    assert logits[torch.bfloat16].dtype == torch.float32
    assert max_error(logits[torch.bfloat16], logits[torch.float32]) < 0.3


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 130])
def test_a_prompt_of_any_length_gives_the_same_cached_and_whole(length, model64):
    ids = draw_ids(1, length, seed=length)
    _, hidden = CachedRun(model64).prefill([2], ids.tolist())
    assert max_error(hidden, model64.forward_sequence(ids)[0]) < 1e-10


@pytest.mark.parametrize("chunks", [[1] * 140, [1, 2, 67, 70], [64, 64, 12], [7] * 20, [139, 1], [4, 4, 132]])
def test_chunk_boundaries_of_the_prefill_do_not_matter(chunks, model64):
    ids = draw_ids(1, sum(chunks))
    run, parts, start = CachedRun(model64), [], 0
    for length in chunks:
        parts.append(run.prefill([1], [ids[0, start : start + length].tolist()])[1])
        start += length
    assert max_error(torch.cat(parts), model64.forward_sequence(ids)[0]) < 1e-10


def test_requests_of_different_lengths_share_a_prefill_pass(model64):
    sequences = [draw_ids(length, seed=length).tolist() for length in (5, 70, 1)]
    _, hidden = CachedRun(model64).prefill([3, 1, 4], sequences)
    expected = torch.cat([model64.forward_sequence(torch.tensor([ids]))[0] for ids in sequences])
    assert max_error(hidden, expected) < 1e-10


@pytest.mark.parametrize("rows", [[1, 2, 3], [4, 1, 3]])
def test_random_histories_end_in_the_states_of_token_by_token_decoding(rows, model64):
    """Verify steps of any width and acceptance, zero-draft steps, prefill steps, in any order: hidden states of all
    committed tokens, delta-net states, convolution windows and keys and values are those of plain decoding."""
    history = RandomHistory(model64, rows, random.Random(len(rows) + rows[0]))
    for _ in range(50):
        history.step()
    history.check()
    assert history.accepted_counts == {1, 2, 3, 4}


class RandomHistory:
    """Several requests in one cache, and what they should look like."""

    def __init__(self, model, rows, rng):
        self.model, self.rows, self.rng = model, rows, rng
        self.run = CachedRun(model)
        self.tokens = {row: [] for row in rows}
        self.hidden = {row: [] for row in rows}
        self.accepted_counts = set()
        self._prefill(rows)

    def step(self):
        rows = self.rng.sample(self.rows, self.rng.randint(1, len(self.rows)))
        self.rng.choice([self._verify, self._verify, self._verify, self._prefill])(rows)

    def _draw(self, count):
        return [self.rng.randrange(320) for _ in range(count)]

    def _prefill(self, rows):
        ids = [self._draw(self.rng.choice([1, 4, 5, 9])) for _ in rows]
        forward, hidden = self.run.prefill(rows, ids)
        self._record(rows, ids, hidden.split(forward.query_lens))

    def _verify(self, rows):
        """All rows have one width, as in an engine: 4 with three drafts, 1 in a zero-draft step."""
        width = self.rng.choice([4, 4, 2, 1])
        ids = [self._draw(width) for _ in rows]
        forward, hidden = self.run.verify(rows, ids)
        counts = [self.rng.randint(1, width) for _ in rows]
        self.accepted_counts |= set(counts)
        self.run.accept(rows, counts)
        self._record(
            rows,
            [part[:count] for part, count in zip(ids, counts, strict=True)],
            [part[:count] for part, count in zip(hidden.split(forward.query_lens), counts, strict=True)],
        )

    def _record(self, rows, ids, hidden):
        for row, row_ids, row_hidden in zip(rows, ids, hidden, strict=True):
            self.tokens[row] += row_ids
            self.hidden[row].append(row_hidden)

    def check(self):
        plain, expected = CachedRun(self.model), {row: [] for row in self.rows}
        for position in range(max(map(len, self.tokens.values()))):
            rows = [row for row in self.rows if position < len(self.tokens[row])]
            _, hidden = plain.prefill(rows, [[self.tokens[row][position]] for row in rows])
            for row, row_hidden in zip(rows, hidden, strict=True):
                expected[row].append(row_hidden)
        for row in self.rows:
            assert max_error(torch.cat(self.hidden[row]), torch.stack(expected[row])) < 1e-10
        self.run.fold(self.rows)
        for row in self.rows:
            length = len(self.tokens[row])
            assert self.run.seq_lens[row] == plain.seq_lens[row] == length
            ours, theirs = self.run.cache, plain.cache
            assert max_error(ours.gdn.state[:, row], theirs.gdn.state[:, row]) < 1e-10
            window = torch.arange(max(0, length - 3), length) % ours.gdn.conv_ring.shape[2]
            assert max_error(ours.gdn.conv_ring[:, row, window], theirs.gdn.conv_ring[:, row, window]) < 1e-10
            assert max_error(self._keys_and_values(self.run, row), self._keys_and_values(plain, row)) < 1e-10

    def _keys_and_values(self, run, row):
        pages = run.cache.kv.data[:, :, run.page_tables[row]].flatten(2, 3)
        return pages[:, :, : len(self.tokens[row])]


def test_a_pass_leaves_the_other_rows_and_pages_alone(model64):
    run = CachedRun(model64)
    run.prefill([1, 2], [draw_ids(6).tolist(), draw_ids(9, seed=1).tolist()])
    gdn = run.cache.gdn
    before = [tensor[:, 2].clone() for tensor in (gdn.state, *gdn.ring, gdn.conv_ring)]
    pages_before = run.cache.kv.data[:, :, run.page_tables[2]].clone()
    run.verify([1], [[5, 6, 7, 8]])
    run.accept([1], [3])
    run.verify([1], [[9]])
    after = [tensor[:, 2] for tensor in (gdn.state, *gdn.ring, gdn.conv_ring)]
    assert all(torch.equal(ours, old) for ours, old in zip(after, before, strict=True))
    assert torch.equal(run.cache.kv.data[:, :, run.page_tables[2]], pages_before)
    assert all(tensor[:, 0].isnan().all() for tensor in (gdn.state, *gdn.ring, gdn.conv_ring))


def test_a_reused_row_forgets_its_last_request(model64):
    ids = draw_ids(1, 30)
    run = CachedRun(model64)
    run.prefill([1], draw_ids(1, 50, seed=9).tolist())
    run.verify([1], [[1, 2, 3, 4]])
    run.cache.gdn.reset(1)
    run.seq_lens[1] = run.accept_lens[1] = 0
    _, hidden = run.prefill([1], ids.tolist())
    assert max_error(hidden, model64.forward_sequence(ids)[0]) < 1e-10


def test_gradients_reach_every_parameter_over_whole_sequences(checkpoint):
    model, _ = load_ours(checkpoint, mtp=False)
    model.requires_grad_(True)
    model.compute_logits(model.forward_sequence(draw_ids(2, 70))).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())
