"""The policy: what is published is what it computes with, in the checkpoint's dtypes; only what is trained moves."""

import pytest
import torch

from models.config import load_config
from models.safetensors_file import FLOAT_TYPES
from models.training.head_checkpoint import load_models, read_tensors
from models.training.mtp_settings import TrainingError
from models.training.rl.policy import Policy
from models.training.rl.recipe import Actor, Mtp, Optimizer
from unit_tests.models.training.mtp_checks import checkpoint

IDS = torch.tensor([[5, 6, 7, 8, 9]])
FAST = Optimizer(lr=1e-2)


def make_policy(dtype="bfloat16", trainable=(), mtp=True, moe=False):
    return Policy(checkpoint(dtype, moe), Actor(FAST, trainable), Mtp(mtp, FAST))


def make_step(policy):
    hidden = policy.target.forward_sequence(IDS)
    loss = policy.target.compute_logits(hidden).logsumexp(-1).sum()
    if any(param.requires_grad for param in policy.head.parameters()):
        loss = loss + policy.head.forward_sequence(IDS, hidden.detach()).square().sum()
    loss.backward()
    return policy.step()


def changed(before, after):
    return {name for name in after if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(("dtype", "moe"), [("bfloat16", False), ("float32", False), ("bfloat16", True)])
def test_a_fresh_model_of_the_published_tensors_computes_the_same(dtype, moe):
    policy = make_policy(dtype, moe=moe)
    make_step(policy)
    assert {tensor.dtype for tensor in policy.tensors.values()} == {getattr(torch, dtype)}
    folder = checkpoint(dtype, moe)
    target, head = load_models(folder, load_config(folder))
    for slot in (*target.weight_slots(), *head.weight_slots()):
        if slot.name in policy.tensors:
            slot.load(policy.tensors[slot.name])
    with torch.no_grad():
        hidden = policy.target.forward_sequence(IDS)
        assert torch.equal(target.forward_sequence(IDS), hidden)
        assert torch.equal(head.forward_sequence(IDS, hidden), policy.head.forward_sequence(IDS, hidden))


def test_before_the_first_step_the_checkpoint_is_published_whole():
    policy = make_policy("float32", trainable=("model.layers.3.",))
    stored = read_tensors(checkpoint("float32"))
    assert policy.tensors.keys() == stored.keys() - {"lm_head.weight"}
    for name, tensor in policy.tensors.items():
        assert tensor.dtype == FLOAT_TYPES[stored[name].dtype]
        whole = torch.cat([values for _, values in stored[name].row_blocks()])
        assert (tensor - whole).abs().max() < 1e-6


def test_only_what_is_named_and_the_head_move():
    policy = make_policy(trainable=("model.layers.3.mlp.",))
    before = dict(policy.tensors)
    norms = make_step(policy)
    names = changed(before, policy.tensors)
    assert any(name.startswith("mtp.") for name in names)
    assert {name for name in names if not name.startswith("mtp.")} == {
        f"model.layers.3.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    }
    assert norms["actor"] > 0
    assert norms["mtp"] > 0


def test_a_head_that_is_not_trained_stays():
    policy = make_policy(mtp=False)
    before = dict(policy.tensors)
    assert make_step(policy).keys() == {"actor"}
    assert not any(name.startswith("mtp.") for name in changed(before, policy.tensors))


def test_steps_below_the_rounding_add_up_in_the_masters():
    policy = Policy(checkpoint("bfloat16"), Actor(Optimizer(lr=1e-4)), Mtp(False))
    start = dict(policy.tensors)
    counts = []
    for _ in range(4):
        make_step(policy)
        weight = policy.tensors["model.embed_tokens.weight"]
        counts.append(int((weight != start["model.embed_tokens.weight"]).sum()))
    assert counts[0] < counts[-1]


def test_a_name_that_fits_no_tensor_is_refused():
    with pytest.raises(TrainingError, match=r"no tensor's name begins with 'model\.layer\.'"):
        make_policy(trainable=("model.norm.", "model.layer."))
