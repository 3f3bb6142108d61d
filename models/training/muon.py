"""Muon: momentum whose update is orthogonalised, for the matrices of hidden layers (Jordan et al., 2024).

    M ← μ M + G ;   W ← (1 − ηλ) W − η · sqrt(max(1, rows / columns)) · orthogonal(G + μ M)

All in float32: a CPU without bf16 units has nothing to gain from less. Embeddings, vectors and convolutions are for
AdamW.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz step; singular values end within 0.7..1.2


class Muon(Optimizer):
    """The optimiser; every parameter is a matrix.

    Args:
        params: matrices [rows, columns].
        lr: step size η; the update has a root mean square of about 1 / sqrt(columns).
        momentum: μ.
        weight_decay: λ, decoupled.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, weight: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        """Update one matrix in place."""
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].mul_(momentum).add_(weight.grad)
        direction = orthogonalize(weight.grad + momentum * state["momentum"])
        scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
        weight.mul_(1.0 - lr * weight_decay).add_(direction, alpha=-lr * scale)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Give the nearest semi-orthogonal matrix, roughly, by Newton-Schulz iterations: [rows, columns] -> the same."""
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if is_tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if is_tall else x
