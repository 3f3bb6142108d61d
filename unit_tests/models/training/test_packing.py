"""Packed documents: the worked examples, contradictions, and that rows and packed tokens are the same thing."""

import pytest
import torch

from models.training.mtp_settings import TrainingError
from models.training.packing import IGNORED, Packing, intersect_mask, unshift_labels

IDS = torch.tensor([10, 11, 12, 20, 21])
POSITIONS = torch.tensor([0, 1, 2, 0, 1])


@pytest.mark.parametrize("bounds", [{"positions": POSITIONS}, {"cu_seqlens": torch.tensor([0, 3, 5])}])
def test_the_example_of_record_rolls_within_documents(bounds):
    packing = Packing.find(IDS, **bounds)
    assert packing.lens == (3, 2)
    assert packing.roll(IDS).tolist() == [11, 12, 0, 21, 0]
    assert packing.roll(IDS, 2, IGNORED).tolist() == [12, IGNORED, IGNORED, IGNORED, IGNORED]


def test_the_example_of_record_intersects_label_masks():
    mask = torch.tensor([[1, 0, 1, 1, 0]]).bool()
    assert intersect_mask(mask, 1).int().tolist() == [[0, 0, 1, 0, 0]]
    assert intersect_mask(torch.ones(1, 5).bool(), 2).int().tolist() == [[1, 1, 1, 0, 0]]


def test_positions_and_cu_seqlens_that_agree_are_both_accepted():
    assert Packing.find(IDS, POSITIONS, torch.tensor([0, 3, 5])).lens == (3, 2)


@pytest.mark.parametrize("bounds", [[0, 2, 5], [0, 5], [0, 3, 4, 5]])
def test_positions_that_contradict_cu_seqlens_are_an_error_that_names_the_token(bounds):
    with pytest.raises(TrainingError, match=r"contradict cu_seqlens: at token \d"):
        Packing.find(IDS, POSITIONS, torch.tensor(bounds))


@pytest.mark.parametrize("bounds", [[1, 5], [0, 4], [0, 3, 3, 5], [0, 4, 3, 5], [0]])
def test_cu_seqlens_that_do_not_rise_from_0_to_the_tokens_are_refused(bounds):
    with pytest.raises(TrainingError, match="must rise from 0 to the 5 tokens"):
        Packing.find(IDS, cu_seqlens=torch.tensor(bounds))


def test_every_row_begins_a_document_whatever_its_positions():
    rows = torch.arange(8).view(2, 4)
    assert Packing.find(rows).lens == (4, 4)
    assert Packing.find(rows, positions=torch.tensor([[0, 1, 0, 1], [2, 3, 4, 5]])).lens == (2, 2, 4)
    with pytest.raises(TrainingError, match="go on in the next row"):
        Packing.find(rows, cu_seqlens=torch.tensor([0, 3, 8]))
    with pytest.raises(TrainingError, match=r"positions are \[8\]"):
        Packing.find(rows, positions=torch.arange(8))


def test_packing_undoes_unpacking_and_gradients_come_back():
    packing, values = Packing.find(IDS, POSITIONS), torch.randn(5, 3, requires_grad=True)
    rows = packing.unpack(values, fill=7)
    assert rows.shape == (2, 3, 3)
    assert (rows[1, 2] == 7).all()
    assert torch.equal(packing.pack(rows), values)
    (packing.pack(rows) * torch.arange(5)[:, None]).sum().backward()
    assert torch.equal(values.grad, torch.arange(5.0)[:, None].expand(5, 3))


def test_labels_that_stand_one_token_early_return_to_their_tokens_and_cross_no_bound():
    early = torch.tensor([11, 12, 20, 21, 99])  # the third and last belong to tokens of other documents
    assert unshift_labels(early, Packing.find(IDS, POSITIONS)).tolist() == [IGNORED, 11, 12, IGNORED, 21]
