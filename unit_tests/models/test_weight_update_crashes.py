"""An exception at any point of a session leaves the weights, and what is known of them, as they were."""

import pytest
import torch

from models import weight_update
from models.weight_slot import WeightSlot
from models.weight_store import WeightStore
from models.weight_transfer.wire import encode_delta
from models.weight_update import Exchange
from unit_tests.checkpoints import make_checkpoint
from unit_tests.models.sessions import change, checksum_of, describe, load_store, parameters

NAMES = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.0.linear_attn.in_proj_b.weight",
    "model.layers.0.linear_attn.conv1d.weight",
    "model.layers.1.mlp.experts.gate_up_proj",
    "model.layers.2.mlp.gate.weight",
    "mtp.fc.weight",
    "mtp.layers.0.input_layernorm.weight",
)


class Crash(Exception):
    """Something that no one expects."""


class Crasher:
    """Lets functions raise when they have been called `countdown` times in all, before or after their work."""

    def __init__(self, monkeypatch, countdown: int, is_after: bool):
        self.patch, self.countdown, self.is_after = monkeypatch, countdown, is_after

    def watch(self, owner, name):
        work = getattr(owner, name)

        def crashing(*args):
            self.countdown -= 1
            if self.countdown == 0 and not self.is_after:
                raise Crash
            done = work(*args)
            if self.countdown == 0:
                raise Crash
            return done

        self.patch.setattr(owner, name, crashing)


def run(store, old, new, is_delta, result):
    session = store.begin(tensors=describe(new), is_partial=True, is_delta=is_delta, result_sha256=result)
    for name, tensor in new.items():
        if is_delta and name != "mtp.fc.weight":
            session.add_delta(name, *encode_delta(old[name], tensor))
        else:
            session.add(name, tensor)
    session.prepare()
    session.commit()
    session.close()


@pytest.mark.parametrize("is_after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("is_delta", "quantization"), [(False, "none"), (True, "none"), (False, "int8")], ids=["full", "delta", "quantized"]
)
def test_a_crash_at_any_point_changes_nothing_and_the_next_session_works(
    is_delta, quantization, is_after, tmp_path, monkeypatch
):
    monkeypatch.setattr(weight_update, "BLOCK_NUMBERS", 500)
    store = load_store(make_checkpoint(tmp_path, num_layers=4, moe=True, dtype="bfloat16"), quantization=quantization)
    old = {name: store.export(name) for name in store.checksums()}
    new = {name: change(old[name], 0.2) for name in NAMES}
    result = "" if store.is_quantized else checksum_of(old | new)
    memory, before, num_crashes = [tensor.clone() for tensor in parameters(store)], store.checksums(), 0
    while crashes(store, old, new, is_delta, result, Crasher(monkeypatch, num_crashes + 1, is_after)):
        num_crashes += 1
        assert all(torch.equal(now, then) for now, then in zip(parameters(store), memory, strict=True)), num_crashes
        assert store.checksums() == before, num_crashes
    assert num_crashes > 45
    assert store.is_quantized or store.checksum() == result


def crashes(store, old, new, is_delta, result, crasher) -> bool:
    """Whether a session does with this crasher around."""
    with crasher.patch.context() as crasher.patch:
        for owner, name in (
            (WeightSlot, "load_rows"),
            (weight_update, "hash_tensor"),
            (WeightSlot, "memory"),
            (Exchange, "_write"),
            (WeightStore, "record"),
        ):
            crasher.watch(owner, name)
        try:
            run(store, old, new, is_delta, result)
        except Crash:
            return True
    return False
