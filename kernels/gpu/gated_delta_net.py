"""The Gated DeltaNet layer between its two projections as Triton launches: convolution, delta rule, gated norm.

What kernels/gated_delta_net.py composes for other devices. Shapes as there; N tokens of B requests.
"""

from collections.abc import Callable

from torch import Tensor

from kernels.gated_delta_net import DeltaNetMemory, DeltaNetShape, DeltaNetWeights, Stand
from kernels.gpu.causal_conv1d import causal_conv1d_prefill, causal_conv1d_verify
from kernels.gpu.gated_delta_rule import DeltaInputs, gated_delta_rule_prefill, gated_delta_rule_verify
from kernels.gpu.rms_norm import gated_rms_norm


def gated_delta_net_verify(
    projected: Tensor, shape: DeltaNetShape, weights: DeltaNetWeights, memory: DeltaNetMemory, stand: Stand
) -> Tensor:
    """A verify step: projected [B · T, C + HV·DV + 2·HV] -> [B · T, HV·DV] in its dtype. Three launches."""
    qkv, gate, gates = _split(projected, shape, weights)
    conv = causal_conv1d_verify(qkv, weights.conv, memory.conv_ring, stand.rows, stand.start_lens)
    inputs = DeltaInputs(conv, gates, weights.a_log, weights.dt_bias)
    out = gated_delta_rule_verify(inputs, shape, memory.state, memory.ring, *stand)
    return gated_rms_norm(out, gate, weights.norm, weights.eps).flatten(1)


def gated_delta_net_prefill(
    projected: Tensor,
    shape: DeltaNetShape,
    weights: DeltaNetWeights,
    memory: DeltaNetMemory,
    stand: Stand,
    query_starts: Tensor,
    longest: int,
    delta_rule: Callable[..., Tensor] = gated_delta_rule_prefill,
) -> Tensor:
    """Known tokens: projected [N, ...], request b's from query_starts[b] (int64, on the device) to the next one's, no
    more than `longest` -> [N, HV·DV]. Five launches; the states stand behind the last tokens afterwards. `delta_rule`
    is a function of gated_delta_rule_prefill's contract."""
    qkv, gate, gates = _split(projected, shape, weights)
    where = (stand.rows, stand.start_lens, query_starts, longest)
    conv = causal_conv1d_prefill(qkv, weights.conv, memory.conv_ring, *where)
    inputs = DeltaInputs(conv, gates, weights.a_log, weights.dt_bias)
    out = delta_rule(inputs, shape, memory.state, memory.ring, *stand, query_starts, longest)
    return gated_rms_norm(out, gate, weights.norm, weights.eps).flatten(1)


def _split(projected: Tensor, shape: DeltaNetShape, weights: DeltaNetWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Views of qkv [N, C], z [N, HV, DV] and b | a [N, 2·HV]."""
    value_size = shape.value_heads * shape.value_dim
    qkv, gate, gates = projected.split([len(weights.conv), value_size, 2 * shape.value_heads], dim=-1)
    return qkv, gate.unflatten(1, (shape.value_heads, shape.value_dim)), gates
