"""The wrapper around transformers' Qwen3.5: off it is not there, on it adds the published head's loss."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers.models.qwen3_5 import modeling_qwen3_5 as hf

from models.errors import CheckpointError
from models.training import transformers_mtp
from models.training.mtp_loss import compute_mtp_loss, run_head
from models.training.mtp_settings import MTPSettings, TrainingError
from models.training.packing import IGNORED
from models.training.transformers_mtp import TransformersMTP
from unit_tests.checkpoints import make_checkpoint
from unit_tests.models.loading import draw_ids, load_ours, load_transformers, max_error

ON = MTPSettings(enabled=True, measure=True)
FORMS = [
    {},
    {"prefix": "vl", "tied": "no"},
    {"moe": True},
    {"moe": True, "prefix": "vl", "expert_layout": "per_expert"},
]
forms = pytest.mark.parametrize("form", FORMS, ids=str)


def make(folder: Path, settings: MTPSettings = ON, **form) -> TransformersMTP:
    make_checkpoint(folder, num_layers=4, **form)
    return TransformersMTP.create(load_transformers(folder), settings, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("text"), num_layers=4)


@pytest.fixture
def wrapper(folder):
    return TransformersMTP.create(load_transformers(folder), ON, folder)


@forms
def test_off_every_output_is_the_models_own_to_the_bit(form, tmp_path):
    wrapper = make(tmp_path, MTPSettings(), **form)
    ids = draw_ids(2, 12)
    inputs = {"input_ids": ids, "labels": ids, "output_hidden_states": True}
    plain, found = load_transformers(tmp_path)(**inputs), wrapper(**inputs)
    assert list(found.keys()) == list(plain.keys())
    assert torch.equal(found.logits, plain.logits)
    assert torch.equal(found.loss, plain.loss)
    assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, plain.hidden_states, strict=True))
    tuples = [model(input_ids=ids, labels=ids, return_dict=False) for model in (wrapper, wrapper.model)]
    assert len(tuples[0]) == len(tuples[1])


@forms
def test_on_the_loss_is_the_models_own_and_the_heads_and_the_rest_keeps_its_bits(form, tmp_path):
    wrapper = make(tmp_path, **form)
    ids = draw_ids(2, 12)
    plain, found = wrapper(input_ids=ids, labels=ids, output_mtp_loss=False), wrapper(input_ids=ids, labels=ids)
    assert torch.equal(found.logits, plain.logits)
    assert found.loss.item() == pytest.approx(plain.loss.item() + found.mtp_loss.item(), abs=1e-5)
    assert list(found.keys())[: len(plain.keys())] == list(plain.keys())
    added = set(found.keys()) - set(plain.keys())
    assert added == {"mtp_loss", *transformers_mtp._METRICS}
    assert found.mtp_token_count.tolist() == [20]
    assert not found.mtp_token_count.is_floating_point()
    assert isinstance(wrapper(input_ids=ids, labels=ids, return_dict=False), tuple)


@forms
def test_the_loss_and_its_gradients_equal_those_of_our_own_models(form, tmp_path):
    wrapper = make(tmp_path, **form)
    target, draft = load_ours(tmp_path)
    draft.requires_grad_(True)
    ids = draw_ids(2, 12)
    found = wrapper(input_ids=ids, labels=ids)
    own = compute_mtp_loss(draft, ids, target.forward_sequence(ids), ids, ON)
    found.mtp_loss.backward()
    own.mtp_loss.backward()
    assert found.mtp_loss.item() == pytest.approx(own.mtp_loss.item(), abs=1e-5)
    for (name, theirs), ours in zip(wrapper.head.named_parameters(), draft.parameters(), strict=True):
        assert max_error(theirs.grad, ours.grad) < 1e-5, name
    assert all(parameter.grad is None for parameter in wrapper.model.parameters())


def check_the_head_reads_hidden_states_after_the_final_norm(wrapper, folder) -> None:
    """The wrapper's loss against transformers' own layers, fed with the model's last hidden states."""
    ids = draw_ids(1, 14)
    hidden = wrapper.model.model(input_ids=ids).last_hidden_state
    y = transformers_head(wrapper.model, load_file(folder / "model.safetensors"), ids, hidden)
    logits = wrapper.model.lm_head(y)[0, :-1]
    expected = nn.functional.cross_entropy(logits, ids[0, 2:])
    found = wrapper(input_ids=ids, labels=ids)
    assert abs(found.mtp_loss_per_depth.item() - expected.item()) < 1e-5


def transformers_head(model, tensors, ids, hidden):
    """The head from transformers' decoder layer and norm: [1, T - 1, H]."""
    config = model.config
    full = config.layer_types.index("full_attention")
    layer, parts = hf.Qwen3_5DecoderLayer(config, full), {}
    prefix = "mtp.layers.0."
    layer.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        parts[name] = hf.Qwen3_5RMSNorm(config.hidden_size, config.rms_norm_eps)
        parts[name].load_state_dict({"weight": tensors[f"mtp.{name}.weight"]})
    embedding = parts["pre_fc_norm_embedding"](model.model.embed_tokens(ids[:, 1:]))
    x = torch.cat([embedding, parts["pre_fc_norm_hidden"](hidden[:, :-1])], dim=-1) @ tensors["mtp.fc.weight"].T
    positions = torch.arange(x.shape[1])[None]
    mask = torch.full((x.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    return parts["norm"](layer(x, model.model.rotary_emb(x, positions.expand(3, 1, -1)), mask, positions))


def test_the_head_equals_one_built_from_transformers_own_layers(wrapper, folder):
    ids = draw_ids(1, 14)
    with torch.no_grad():
        hidden = wrapper.model.model(input_ids=ids).last_hidden_state
        expected = transformers_head(wrapper.model, load_file(folder / "model.safetensors"), ids, hidden)
        found = run_head(wrapper.head, wrapper.model.model.embed_tokens(ids[:, 1:]), hidden[:, :-1])
    assert max_error(found, expected) < 1e-6 * expected.abs().max()
    check_the_head_reads_hidden_states_after_the_final_norm(wrapper, folder)


def test_hidden_states_before_the_final_norm_are_noticed(wrapper, folder, monkeypatch):
    @contextmanager
    def wrong(model):
        kept = []
        with model.get_decoder().norm.register_forward_pre_hook(lambda _, arguments: kept.append(arguments[0])):
            yield kept

    monkeypatch.setattr(transformers_mtp, "keep_hidden", wrong)
    with pytest.raises(AssertionError):
        check_the_head_reads_hidden_states_after_the_final_norm(wrapper, folder)


@pytest.mark.parametrize("bounds", ["position_ids", "cu_seqlens"])
def test_packed_documents_give_what_they_give_alone(bounds, wrapper):
    docs = [draw_ids(1, length, seed=length) for length in (7, 4, 9)]
    ids = torch.cat(docs, dim=1)
    given = {
        "position_ids": torch.cat([torch.arange(doc.shape[1]) for doc in docs])[None],
        "cu_seqlens": torch.tensor([0, 7, 11, 20]),
    }[bounds]
    packed = wrapper(input_ids=ids, labels=ids, **{bounds: given})
    alone = [wrapper(input_ids=doc, labels=doc) for doc in docs]
    counts = torch.tensor([output.mtp_token_count.item() for output in alone])
    expected = sum(output.mtp_loss * count for output, count in zip(alone, counts, strict=True)) / counts.sum()
    assert packed.mtp_token_count.item() == counts.sum()
    assert packed.mtp_loss.item() == pytest.approx(expected.item(), abs=1e-5)
    main = sum((output.loss - output.mtp_loss) * (count + 1) for output, count in zip(alone, counts, strict=True))
    assert (packed.loss - packed.mtp_loss).item() == pytest.approx((main / (counts + 1).sum()).item(), abs=1e-5)
    assert max_error(packed.logits, torch.cat([output.logits for output in alone], dim=1)) < 1e-4


def test_padding_on_the_right_counts_for_nothing_and_on_the_left_is_refused(wrapper):
    ids = draw_ids(1, 9)
    padded, mask = nn.functional.pad(ids, (0, 4)), nn.functional.pad(torch.ones_like(ids), (0, 4))
    found = wrapper(input_ids=padded, labels=padded.masked_fill(mask == 0, IGNORED), attention_mask=mask)
    unmarked = wrapper(input_ids=padded, labels=padded, attention_mask=mask)
    alone = wrapper(input_ids=ids, labels=ids)
    assert found.mtp_loss.item() == pytest.approx(alone.mtp_loss.item(), abs=1e-5)
    assert torch.equal(unmarked.mtp_loss, found.mtp_loss)
    with pytest.raises(TrainingError, match="padding on the right only"):
        wrapper(input_ids=padded, labels=padded, attention_mask=mask.flip(1))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recompute_of_trunk_and_head_changes_no_gradient(use_reentrant, wrapper):
    ids, results = draw_ids(2, 10), []
    for recompute in (False, True):
        wrapper.settings = MTPSettings(enabled=True, recompute="reentrant" if recompute else "none")
        if recompute:
            wrapper.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        wrapper.train().zero_grad()
        wrapper(input_ids=ids, labels=ids).loss.backward()
        results.append({name: parameter.grad.clone() for name, parameter in wrapper.named_parameters()})
    assert all(max_error(results[0][name], results[1][name]) < 1e-6 for name in results[0])
    assert any(name.startswith("head.") for name in results[0])


def test_the_trunks_gradients_are_the_same_to_the_bit_with_the_loss_on_and_off(wrapper):
    ids, results = draw_ids(2, 10), []
    for is_on in (False, True):
        wrapper.zero_grad()
        wrapper(input_ids=ids, labels=ids, output_mtp_loss=is_on).loss.backward()
        results.append({name: parameter.grad.clone() for name, parameter in wrapper.model.named_parameters()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "needs labels"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 8, 64)}, "needs input_ids"),
        ({"logits_to_keep": 1}, "logits_to_keep is given"),
        ({"pixel_values": torch.zeros(1)}, "pixel_values: the MTP loss is for text only"),
        ({"cu_seqlens": torch.tensor([0, 3, 8]), "attention_mask": torch.ones(1, 8)}, "attention_mask with several"),
        ({"cu_seqlens": torch.tensor([0, 3, 8]), "output_attentions": True}, "output_attentions with several"),
        ({"cu_seqlens": torch.tensor([0, 3, 8]), "position_ids": torch.arange(8)[None]}, "contradict cu_seqlens"),
    ],
)
def test_what_the_loss_cannot_use_is_refused_by_name(change, message, wrapper):
    ids = draw_ids(1, 8)
    with pytest.raises(TrainingError, match=message):
        wrapper(**({"input_ids": ids, "labels": ids} | change))


def test_without_labels_the_loss_must_be_off(wrapper):
    assert "mtp_loss" not in wrapper(input_ids=draw_ids(1, 8), output_mtp_loss=False)


def test_a_hook_does_not_outlive_a_pass_that_fails(wrapper):
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        wrapper(input_ids=torch.full((1, 4), 10**6), labels=torch.zeros(1, 4, dtype=torch.int64))
    assert not wrapper.model.get_decoder().norm._forward_hooks


def test_a_missing_head_is_an_error_that_names_keys_or_a_new_one_by_request(tmp_path):
    folder = make_checkpoint(tmp_path, num_layers=4, mtp_layers=0)
    model = load_transformers(folder)
    with pytest.raises(TrainingError, match="mtp_num_hidden_layers is 0"):
        TransformersMTP.create(model, ON, folder)
    with pytest.raises(TrainingError, match="give the directory"):
        TransformersMTP.create(model, ON)
    ids = draw_ids(1, 8)
    assert TransformersMTP.create(model, ON, mtp_init="random")(input_ids=ids, labels=ids).mtp_loss.isfinite()


def test_another_family_is_refused(folder):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, **sizes)
    with pytest.raises(CheckpointError, match="architecture LlamaForCausalLM is not served"):
        TransformersMTP.create(transformers.LlamaForCausalLM(config), ON, folder)


def test_a_saved_head_is_the_trained_one_and_the_trunk_keeps_its_bytes(wrapper, folder, tmp_path):
    optimizer = torch.optim.SGD(wrapper.head.parameters(), lr=0.1)
    ids = draw_ids(2, 12)
    wrapper(input_ids=ids, labels=ids).mtp_loss.backward()
    optimizer.step()
    wrapper.save(folder, tmp_path / "out")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("mtp.") for name in changed)
    again = TransformersMTP.create(load_transformers(tmp_path / "out"), ON, tmp_path / "out")
    for (name, value), loaded in zip(wrapper.head.named_parameters(), again.head.parameters(), strict=True):
        assert max_error(value.detach(), loaded.detach()) < 1e-6, name
