import json
from collections import Counter
from pathlib import Path

import pytest

from models.conversion.report import Report
from models.errors import CheckpointError


def test_it_counts_what_was_done(tmp_path: Path) -> None:
    report = Report("x", 9, {"a": ("b", "c")}, Counter({"vision": 3}), notes=["two norms are wider"])
    report.require_complete()
    text = str(report)
    for line in ("9 tensors of x", "1 Megatron weights, 2 Hugging Face weights", "3 vision", "two norms are wider"):
        assert line in text
    report.save(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["mapped"] == {"a": ["b", "c"]}


def test_left_over_and_missing_tensors_are_an_error_that_names_them() -> None:
    with pytest.raises(CheckpointError, match=r"^x: no rule for odd$"):
        Report("x", left_over=["odd"]).require_complete()
    with pytest.raises(CheckpointError, match=r"no rule for odd; missing m0, .*, m7 and 2 more"):
        Report("x", left_over=["odd"], missing=[f"m{i}" for i in range(10)]).require_complete()
