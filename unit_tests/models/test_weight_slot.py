"""One checkpoint tensor in its place: loading writes that place only, exporting reads it back."""

import torch
from torch import nn

from kernels.quantized_linear import QuantizedWeight
from models.safetensors_file import read_tensor_index
from models.weight_slot import WeightSlot
from models.weights import save_weights


def make_parameter(*shape):
    return nn.Parameter(torch.full(shape, -1.0))


def test_loading_writes_the_indexed_part_only():
    param, values = make_parameter(5, 3), torch.randn(2, 3)
    WeightSlot("w", param, slice(1, 3)).load(values)
    assert torch.equal(param[1:3], values)
    assert (param[[0, 3, 4]] == -1).all()


def test_the_shift_is_added_in_the_parameters_precision_and_taken_off_again():
    param = make_parameter(4)
    slot = WeightSlot("norm", param, shift=1.0)
    small = torch.tensor([1e-3, -1e-3, 0.5, 2.0]).bfloat16()
    slot.load(small)
    assert torch.equal(param.data, small.float() + 1)
    torch.testing.assert_close(slot.export(), small.float())


def test_the_checkpoint_shape_may_differ_from_the_parameters():
    param, values = make_parameter(6, 4), torch.randn(6, 1, 4)
    slot = WeightSlot("conv", param, shape=(6, 1, 4))
    assert slot.checkpoint_shape == (6, 1, 4)
    slot.load(values)
    assert torch.equal(param.data, values[:, 0])
    assert torch.equal(slot.export(), values)


def test_a_tensor_that_is_not_contiguous_loads():
    param, values = make_parameter(3, 5), torch.randn(5, 3)
    WeightSlot("w", param).load(values.T)
    assert torch.equal(param.data, values.T)


def test_a_tensor_in_a_file_loads_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr("models.safetensors_file.BLOCK_BYTES", 50)
    values = torch.randn(9, 1, 4)
    save_weights(tmp_path / "x.safetensors", {"conv": values})
    param = make_parameter(9, 4)
    WeightSlot("conv", param, shift=1.0, shape=(9, 1, 4)).load(read_tensor_index(tmp_path / "x.safetensors")["conv"])
    assert torch.equal(param.data, values[:, 0] + 1)


def test_an_export_is_a_copy():
    param = make_parameter(3)
    exported = WeightSlot("w", param).export()
    exported.fill_(9)
    assert (param == -1).all()


def test_rows_of_a_quantized_weight_are_loaded_block_by_block_and_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr("models.safetensors_file.BLOCK_BYTES", 500)
    values = torch.randn(2, 9, 40)
    save_weights(tmp_path / "x.safetensors", {"w": values[1]})
    weight = QuantizedWeight((3, 20, 40), 8, torch.float32)
    slot = WeightSlot("w", weight, (1, slice(4, 13)))
    assert slot.checkpoint_shape == (9, 40) and slot.numel() == 360
    slot.load(read_tensor_index(tmp_path / "x.safetensors")["w"])
    assert (slot.export() - values[1]).abs().max() < 0.02
    everything = WeightSlot("all", weight).export()
    assert everything.shape == (3, 20, 40) and torch.equal(everything[1, 4:13], slot.export())
    assert everything.count_nonzero() <= 360


def test_what_was_loaded_comes_back_where_a_sum_would_round_it():
    param, kept = make_parameter(4), torch.zeros(4)
    slot = WeightSlot("norm", param, shift=1.0, unshifted=kept)
    small = torch.tensor([1e-9, -0.0, 0.3, 1e-3])
    slot.load(small)
    assert torch.equal(param.data, small + 1) and not torch.equal((small + 1) - 1, small)
    assert torch.equal(slot.export(), small) and slot.export()[1].signbit()
    param.data[2] = 5.0
    assert slot.export().tolist() == [small[0].item(), 0.0, 4.0, small[3].item()]


def test_a_shadow_is_the_same_tensor_in_other_memory():
    param, kept = make_parameter(5, 3), torch.full((2,), 7.0)
    slot = WeightSlot("w", param, slice(1, 3))
    shadow = slot.shadow()
    assert shadow.name == "w" and shadow.checkpoint_shape == (2, 3)
    values = torch.randn(2, 3)
    shadow.load(values)
    assert (param == -1).all() and torch.equal(shadow.export(), values)
    [mine], [theirs] = slot.memory(), shadow.memory()
    mine.copy_(theirs)
    assert torch.equal(param[1:3], values) and (param[[0, 3, 4]] == -1).all()
    norm = WeightSlot("norm", make_parameter(2), shift=1.0, unshifted=kept)
    norm.shadow().load(torch.ones(2))
    assert [part.tolist() for part in norm.memory()] == [[-1.0, -1.0], [7.0, 7.0]]
