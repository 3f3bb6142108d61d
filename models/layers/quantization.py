"""Weights of few bits in place of a model's matrices."""

from torch import nn

from kernels.quantized_linear import BITS, QuantizedWeight

_MATRICES = ("weight", "gate_up", "down")
# Small, and a wrong choice of experts costs more than their bytes.
_KEPT = ("router", "shared_gate")


def quantize_layers(model: nn.Module, quantization: str) -> None:
    """Have the embedding, the projections and the experts of `model` as int8 or int4, empty; matrices that were one
    stay one. Norms, convolutions and gates stay as they are."""
    quantized: dict[nn.Parameter, QuantizedWeight] = {}
    for name, module in list(model.named_modules()):
        if name.endswith(_KEPT):
            continue
        for key, matrix in list(module.named_parameters(recurse=False)):
            if key in _MATRICES:
                if matrix not in quantized:
                    quantized[matrix] = QuantizedWeight(matrix.shape, BITS[quantization], matrix.dtype)
                delattr(module, key)
                setattr(module, key, quantized[matrix])
