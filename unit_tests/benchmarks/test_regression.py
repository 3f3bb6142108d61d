"""A commit is checked out beside this tree and cleaned up; a row fails only where its whole interval is too low."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import regression
from benchmarks.regression import BATCHES, MTP_STEPS, judge, main, make_tasks, parse_args, worktree
from benchmarks.versions import Task


def git(directory: Path, *command: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *command], cwd=directory, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits of one file, in place of this project."""
    git(tmp_path, "init", "--quiet")
    for text in ("old", "new"):
        (tmp_path / "file").write_text(text)
        git(tmp_path, "add", "file")
        git(tmp_path, "commit", "--quiet", "-m", text)
    monkeypatch.setattr(regression, "HERE", tmp_path)
    return tmp_path


def test_the_commit_lies_in_a_worktree_that_goes_away(repository: Path) -> None:
    with worktree("HEAD~1") as (root, commit):
        assert (root / "file").read_text() == "old" and (repository / "file").read_text() == "new"
        assert git(repository, "rev-parse", "HEAD~1").startswith(commit)
    assert not root.exists() and len(git(repository, "worktree", "list").splitlines()) == 1


def test_it_goes_away_after_a_failure_too(repository: Path) -> None:
    with pytest.raises(KeyboardInterrupt), worktree("HEAD"):
        raise KeyboardInterrupt
    assert len(git(repository, "worktree", "list").splitlines()) == 1


@pytest.mark.usefixtures("repository")
def test_an_unknown_revision_is_one_line() -> None:
    with pytest.raises(SystemExit, match="git rev-parse --verify --short nothing"), worktree("nothing"):
        pass


def test_the_set_is_decode_over_batch_and_mtp_step_and_a_prefill_of_both_models(tmp_path: Path) -> None:
    tasks = make_tasks(tmp_path, parse_args([]))
    assert len(tasks) == 2 * (len(BATCHES) * len(MTP_STEPS) + 1)
    assert len(tasks["demo", 4, 3].texts) == 4 and not tasks["tiny", 4, 3].texts
    assert tasks["tiny", 16, 1].settings["mtp_step"] == 1 and tasks["demo", 0, 0].batch == 0


@pytest.mark.parametrize(("ratio", "low", "high", "holds"), [(0.8, 0.7, 0.9, False), (0.9, 0.8, 0.96, True)])
def test_a_row_fails_when_all_of_its_interval_is_below_the_tolerance(
    ratio: float, low: float, high: float, holds: bool
) -> None:
    speeds = {"new_over_old": ratio, "new_over_old_min": low, "new_over_old_max": high}
    (row,) = judge({("tiny", 4, 1): speeds}, 0.95)
    assert row["holds"] is holds and row["what"] == "decode, batch 4"


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize(("high", "code"), [(0.94, 1), (1.2, 0)])
def test_the_exit_code_tells(
    high: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compare(root: Path, tasks: Sequence[Task], num_rounds: int) -> list[dict[str, float]]:
        assert (root / "file").read_text() == "old" and num_rounds == 3
        return [{"new_over_old": 0.9, "new_over_old_min": 0.8, "new_over_old_max": high} for _ in tasks]

    monkeypatch.setattr(regression, "compare_versions", compare)
    assert main(["--rounds", "3"]) == code
    out = capsys.readouterr().out
    assert f"{20 * code} of 20 are slower than 0.95 times" in out
    written = json.loads(out.splitlines()[-1])
    assert written["benchmark"] == "regression" and len(written["results"]) == 20


@pytest.mark.parametrize("command", ["--rounds 0", "--tolerance 0"])
def test_numbers_that_make_no_sense_are_refused(command: str) -> None:
    with pytest.raises(SystemExit):
        parse_args(command.split())
