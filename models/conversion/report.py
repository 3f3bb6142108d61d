"""What a conversion read, mapped, set aside, did not know and did not find."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from models.errors import CheckpointError

SHOWN = 8


@dataclass
class Report:
    """The account of one conversion. `left_over` and `missing` name tensors; any of them is an error.

    set_aside counts by reason what is no language-model weight; notes are sentences.
    """

    source: str
    num_read: int = 0
    mapped: dict[str, tuple[str, ...]] = field(default_factory=dict)
    set_aside: Counter[str] = field(default_factory=Counter)
    left_over: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def require_complete(self) -> None:
        """Raises CheckpointError that names what was left over and what is missing."""
        if self.left_over or self.missing:
            lines = [_name_some("no rule for", self.left_over), _name_some("missing", self.missing)]
            raise CheckpointError(f"{self.source}: " + "; ".join(line for line in lines if line))

    def __str__(self) -> str:
        results = sum(map(len, self.mapped.values()))
        aside = ", ".join(f"{count} {reason}" for reason, count in sorted(self.set_aside.items()))
        lines = [
            f"read       {self.num_read} tensors of {self.source}",
            f"mapped     {len(self.mapped)} Megatron weights, {results} Hugging Face weights",
            f"set aside  {aside or 'nothing'}",
            f"left over  {len(self.left_over)}",
            f"missing    {len(self.missing)}",
        ]
        return "\n".join(lines + [f"note       {note}" for note in self.notes])

    def save(self, path: Path) -> None:
        """Write it as JSON, with every name."""
        fields = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _name_some(what: str, names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{what} {', '.join(names[:SHOWN])}{more}" if names else ""
