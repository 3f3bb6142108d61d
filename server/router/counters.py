"""What the scheduler counts. No torch."""

from dataclasses import dataclass, field


@dataclass
class Counters:
    """Totals since start. Drafts behind the token that ends a request are not judged, so they do not count."""

    num_verify_steps: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_proposed: int = 0
    num_accepted: int = 0
    num_timeouts: int = 0
    proposed_per_position: list[int] = field(default_factory=list)
    accepted_per_position: list[int] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=lambda: {"non_finite": 0, "zero_acceptance": 0, "divergence": 0})

    def count_drafts(self, num_judged: int, num_accepted: int) -> None:
        """One request's verify step: of the drafts that were judged, the first num_accepted were right."""
        self.num_verify_steps += 1
        self.num_proposed += num_judged
        self.num_accepted += num_accepted
        for position in range(num_judged):
            self.proposed_per_position[position] += 1
            self.accepted_per_position[position] += position < num_accepted
