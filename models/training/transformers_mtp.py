"""A transformers Qwen3.5 with a draft head that is trained: `loss` becomes the model's own plus `mtp_loss`.

The model is left as it is: off, its outputs are the very ones it gives without this; on, they are too, with fields
added at the end. The head is ours (models/qwen3_5_mtp) over the model's embedding, output head and last hidden states.
Knows transformers only through the object it is given.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from kernels.rotary import rotary_angles
from models.config import ModelConfig, read_json
from models.qwen3_5.attention import Rotary
from models.qwen3_5.model import Qwen35
from models.qwen3_5_mtp.model import Qwen35MTP
from models.training.head_checkpoint import load_head, save_checkpoint
from models.training.mtp_loss import MTPOutput, compute_mtp_loss
from models.training.mtp_settings import MTPSettings, TrainingError, check_trainable
from models.training.packing import IGNORED, Packing

_VISION = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")
_METRICS = ("mtp_loss_per_depth", "mtp_token_count", "mtp_accept_rate", "mtp_greedy_accept_rate", "mtp_overlap")


class BorrowedTarget:
    """What a draft head reads of its target, from a transformers model."""

    def __init__(self, model: Any, config: ModelConfig):
        self.config = config
        self.embed_tokens, self.lm_head = model.get_input_embeddings(), model.lm_head

    def rotary(self, positions: Tensor) -> Rotary:
        """cos and sin for positions [N]."""
        wide = torch.promote_types(self.lm_head.weight.dtype, torch.float32)
        return rotary_angles(positions, self.config.rotary_dim, self.config.rope_theta, wide)

    def kernel_front(self) -> dict[str, Tensor]:
        """What stands before the layers, by the names of kernels/cpu/decoder.py."""
        return {"embedding": self.embed_tokens.weight}


class TransformersMTP(nn.Module):
    """Called as the model is.

    `model` is a Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration or one of their MoE sisters, `head` its draft head,
    a submodule with parameters of its own.
    """

    def __init__(self, model: nn.Module, head: Qwen35MTP, settings: MTPSettings):
        super().__init__()
        self.model, self.head, self.settings = model, head, settings

    @staticmethod
    def create(
        model: Any, settings: MTPSettings, directory: str | Path | None = None, mtp_init: str = "checkpoint"
    ) -> "TransformersMTP":
        """Add the head in the checkpoint `directory`, or with mtp_init="random" a new one.

        Raises CheckpointError for another family, TrainingError when the checkpoint's head is not there or not whole.
        """
        fields = model.config.to_dict() | {"architectures": [type(model).__name__]}
        if directory is not None:
            fields = read_json(Path(directory) / "config.json") | {"architectures": fields["architectures"]}
        is_random = mtp_init == "random"
        if not is_random and directory is None:
            raise TrainingError("the head is read from a checkpoint, transformers leaves it there: give the directory")
        config = check_trainable(fields, has_new_head=is_random)
        target = cast(Qwen35, BorrowedTarget(model, config))
        place = None if directory is None else Path(directory)
        head = load_head(place, config, target, is_random, str(model.lm_head.weight.device))
        return TransformersMTP(model, head, settings)

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        output_mtp_loss: bool | None = None,
        **inputs: Any,
    ) -> Any:
        """The model's output. With the loss on (output_mtp_loss, by default settings.enabled) and input_ids and labels
        [B, T] it has `mtp_loss`, which is part of `loss`, and its metrics at the end.

        Rows that hold several documents (position_ids [B, T] or cu_seqlens over all rows) are run document by document,
        because transformers' delta rule goes on from one to the next; logits come back packed.
        """
        is_on = self.settings.enabled if output_mtp_loss is None else output_mtp_loss
        if not is_on:
            return self.model(input_ids=input_ids, labels=labels, **inputs)
        input_ids, labels = _require_inputs(input_ids, labels, inputs)
        is_tuple = inputs.pop("return_dict", True) is False
        packing = Packing.find(input_ids, inputs.get("position_ids"), cu_seqlens)
        is_packed = len(packing.lens) > len(input_ids)
        rows, row_labels = input_ids, labels
        if is_packed:
            rows, row_labels, inputs = _unpack(packing, input_ids, labels, inputs)
        with keep_hidden(self.model) as kept:
            outputs = self.model(input_ids=rows, labels=row_labels, **inputs)
        hidden_labels = _drop_padding(row_labels, inputs.get("attention_mask"))
        found = compute_mtp_loss(self.head, rows, kept[0], hidden_labels, self.settings)
        if is_packed:
            outputs["logits"] = packing.pack(outputs.logits).view(*input_ids.shape, -1)
        _add(outputs, found)
        return outputs.to_tuple() if is_tuple else outputs

    def save(self, source: str | Path, out: str | Path) -> None:
        """Copy the checkpoint `source` to the new directory `out` with this head; the trunk's bytes stay."""
        save_checkpoint(Path(source), Path(out), [self.head])


@contextmanager
def keep_hidden(model: Any) -> Iterator[list[Tensor]]:
    """Inside, the list has the hidden states [B, T, H] after the final norm of the model's last pass."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Tensor) -> None:
        kept[:] = [output]

    with model.get_decoder().norm.register_forward_hook(keep):
        yield kept


def _require_inputs(input_ids: Tensor | None, labels: Tensor | None, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Token ids and labels, or TrainingError for a call without them or with what the loss cannot use."""
    if input_ids is None or labels is None:
        missing = "input_ids" if input_ids is None else "labels"
        raise TrainingError(f"the MTP loss needs {missing}: give them, or output_mtp_loss=False")
    for name in _VISION:
        if inputs.get(name) is not None:
            raise TrainingError(f"{name}: the MTP loss is for text only; output_mtp_loss=False leaves it out")
    for name in ("logits_to_keep", "cache", "past_key_values", "inputs_embeds"):
        value = inputs.get(name)
        if value is not None and not (isinstance(value, int) and value == 0):
            raise TrainingError(f"{name} is given: the MTP loss needs whole sequences of token ids, leave it out")
    return input_ids, labels


def _unpack(
    packing: Packing, input_ids: Tensor, labels: Tensor, inputs: dict[str, Any]
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """One document per row, padded on the right and so invisible; the model numbers the positions itself."""
    if inputs.get("attention_mask") is not None:
        raise TrainingError(
            "attention_mask with several documents in a row: position_ids or cu_seqlens say all, leave it out"
        )
    for name in ("output_hidden_states", "output_attentions"):
        if inputs.get(name):
            raise TrainingError(f"{name} with several documents in a row: give one document per row")
    rest = {name: value for name, value in inputs.items() if name != "position_ids"}
    return packing.unpack(input_ids.flatten()), packing.unpack(labels.flatten(), IGNORED), rest


def _drop_padding(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Labels without those of padding, which must stand on the right: a head may attend to what comes before."""
    if attention_mask is None:
        return labels
    if attention_mask.shape != labels.shape or (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
        raise TrainingError(
            f"attention_mask {list(attention_mask.shape)} must be [B, T] with padding on the right only"
        )
    return labels.masked_fill(attention_mask == 0, IGNORED)


def _add(outputs: Any, found: MTPOutput) -> None:
    """Put the loss and its metrics behind the model's own fields."""
    outputs["loss"] = outputs.loss + found.mtp_loss
    outputs["mtp_loss"] = found.mtp_loss
    for name in _METRICS:
        if (value := getattr(found, name)) is not None:
            outputs[name] = value
