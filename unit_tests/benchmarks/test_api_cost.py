"""The cost of the API: whose turn it is, what is asked, and what of it is reported."""

import pytest

from benchmarks.api_cost import FEATURES, Load, main, parse_args, ratios_of, take_turns


def test_every_round_begins_with_another_contestant_and_the_first_one_warms_up() -> None:
    asked: list[str] = []

    def contestant(seed: str) -> float:
        asked.append(seed)
        return float(len(asked))

    speeds = take_turns(dict.fromkeys("ab", contestant), 2)
    assert asked == ["a 0", "b 0", "b 1", "a 1", "a 2", "b 2"]
    assert speeds == {"a": [4.0, 5.0], "b": [3.0, 6.0]}


def test_a_ratio_is_of_one_round() -> None:
    ratios = ratios_of({"a": [1.0, 9.0, 6.0], "b": [2.0, 3.0, 6.0]}, "a", "b")
    assert ratios == {"ratio": 1.0, "ratio_min": 0.5, "ratio_max": 3.0}


def test_contestants_are_asked_for_as_much_and_never_for_the_same() -> None:
    load = Load(200, 100, 4)
    plain, costly = (load.bodies(seed, FEATURES[name]) for seed, name in (("x", "nothing"), ("y", "all")))
    assert plain == load.bodies("x", {})
    assert not {body["prompt"] for body in plain[:20]} & {body["prompt"] for body in costly[:20]}
    lengths = [body["max_tokens"] for body in plain]
    assert min(lengths) >= 50 and max(lengths) <= 150 and 90 < sum(lengths) / 200 < 110
    assert costly[0].items() >= FEATURES["all"].items()


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--seconds", "-1"], ["--idle", "x"]])
def test_numbers_out_of_range_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_a_server_that_does_not_start_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "/nowhere"]) == 1
    assert "error: --launch" in capsys.readouterr().err
