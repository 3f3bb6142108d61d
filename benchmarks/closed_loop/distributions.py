"""Are sampled tokens of one distribution with and without drafts? A chi-square test of the first tokens of a text.

Every server has seeds of its own: under the same seeds the tokens are the same, and there would be nothing to test.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.closed_loop.answers import complete
from benchmarks.openai_server import Server

OPEN_PROMPT = "Question:"  # nothing is decided yet: many tokens may follow
NUM_POSITIONS = 3  # from prefill, from a draft that was verified, and behind it
SAMPLES_PER_REQUEST = 64
LEAST_EXPECTED = 5.0  # in every cell
LEAST_P = 0.01  # of all tests together


def compare_distributions(servers: dict[str, Server], num_samples: int) -> list[dict[str, Any]]:
    """A row per position and server but the first, against the first. Raises RunFailed."""
    drawn = {
        name: draw_first_tokens(server, num_samples, index * num_samples)
        for index, (name, server) in enumerate(servers.items())
    }
    (_, plain), *others = drawn.items()
    return [
        {"server": name, "position": position + 1, **chi_square(_column(plain, position), _column(own, position))}
        for name, own in others
        for position in range(NUM_POSITIONS)
    ]


def are_alike(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether no test speaks against one distribution, by Bonferroni's bound, and one at least could have."""
    least = min(row["p_value"] for row in rows)
    return least * len(rows) > LEAST_P and any(row["categories"] > 1 for row in rows)


def draw_first_tokens(server: Server, num_samples: int, first_seed: int) -> list[list[int]]:
    """The first tokens of `num_samples` texts at temperature 1, with seeds from `first_seed` on."""
    shape = {"max_tokens": NUM_POSITIONS, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "ignore_eos": True}
    samples: list[list[int]] = []
    while len(samples) < num_samples:
        how = {"n": min(SAMPLES_PER_REQUEST, num_samples - len(samples)), "seed": first_seed + len(samples)}
        samples += [choice["token_ids"] for choice in complete(server, {"prompt": OPEN_PROMPT, **shape, **how})]
    return samples


def chi_square(one: Counter[int], other: Counter[int]) -> dict[str, Any]:
    """Pearson's test that two samples are of one distribution; rare tokens are one category together.

    The p-value is the upper tail of the chi-square distribution, Γ(dof / 2, χ² / 2) / Γ(dof / 2).
    """
    sizes = torch.tensor([one.total(), other.total()], dtype=torch.float64)
    cells = torch.tensor(_pool_rare(one, other), dtype=torch.float64)  # [categories, 2]
    expected = cells.sum(1, keepdim=True) * sizes / sizes.sum()
    statistic = ((cells - expected) ** 2 / expected).sum()
    dof = torch.tensor(len(cells) - 1, dtype=torch.float64)
    p_value = torch.special.gammaincc(dof / 2, statistic / 2).item() if dof else 1.0
    return {"categories": len(cells), "chi_square": statistic.item(), "p_value": p_value}


def _pool_rare(one: Counter[int], other: Counter[int]) -> list[list[int]]:
    """Counts of both samples per category; what is rare stays out if it is rare even together."""
    least = LEAST_EXPECTED * (one.total() + other.total()) / min(one.total(), other.total())
    common, rest = [], [0, 0]
    for token_id, count in (one + other).items():
        if count >= least:
            common.append([one[token_id], other[token_id]])
        else:
            rest = [rest[0] + one[token_id], rest[1] + other[token_id]]
    return [*common, rest] if sum(rest) >= least or not common else common


def _column(samples: Sequence[Sequence[int]], position: int) -> Counter[int]:
    return Counter(sample[position] for sample in samples)
