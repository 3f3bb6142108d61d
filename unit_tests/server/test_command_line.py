"""Flags and settings files become settings, and mistakes become one line."""

from pathlib import Path

import pytest

from server.command_line import ADMIN_API_KEY_VARIABLE, API_KEY_VARIABLE, CommandLine, build_parser, read_command_line
from server.config import DEMO_MODEL
from server.errors import ConfigError


def read(*arguments: str, **environment: str) -> CommandLine:
    return read_command_line(arguments, environment)


@pytest.fixture
def settings_file(tmp_path: Path):
    """Writes a settings file and gives its path."""

    def write(text: str) -> str:
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_without_flags_the_demo_is_served() -> None:
    command = read()
    assert command.engine.model == DEMO_MODEL
    assert command.server.port == 8000
    assert not command.is_check


@pytest.mark.parametrize("flag", ["--mtp-step", "--mtp_step"])
def test_underscores_and_hyphens_are_alike(flag: str) -> None:
    assert read(flag, "3").engine.mtp_step == 3
    assert read(f"{flag}=4", "--served-model-name=a_b").engine.mtp_step == 4


def test_underscores_in_values_stay() -> None:
    assert read("--served_model_name=a_b").server.served_model_name == ("a_b",)


def test_the_model_may_come_without_its_flag() -> None:
    assert read("some/model", "--mtp-step", "1").engine.model == "some/model"
    assert read("m", "--model", "m").engine.model == "m"
    with pytest.raises(ConfigError, match="the model is given twice, as m and as --model n"):
        read("m", "--model", "n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mtp-step", "9"], "0..8"),
        (["--mtp-stepp", "1"], "did you mean --mtp-step?"),
        (["--max-num-seq", "1"], "did you mean --max-num-seqs?"),
        (["--quant=fp8"], "no flag --quant;"),
        (["--port", "http"], "argument --port: 'http' is not a whole number"),
        (["--port", "70000"], "0..65535"),
        (["--dtype", "int3"], "invalid choice"),
        (["--page-size", "0"], "at least 1"),
        (["--model"], "expected one argument"),
        (["model", "stray"], "no flag stray"),
    ],
)
def test_a_wrong_flag_is_an_error_of_one_line_that_says_what_is_right(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*arguments)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_a_key_comes_from_the_environment_unless_flags_have_one() -> None:
    assert read(**{API_KEY_VARIABLE: "from-outside"}).server.api_key == ("from-outside",)
    assert read("--api-key", "a", "b", **{API_KEY_VARIABLE: "c"}).server.api_key == ("a", "b")
    assert read(**{API_KEY_VARIABLE: ""}).server.api_key == ()
    outside = {ADMIN_API_KEY_VARIABLE: "from-outside"}
    assert read("--enable-rl", **outside).server.admin_api_key == "from-outside"
    assert read("--enable-rl", "--admin-api-key", "a", **outside).server.admin_api_key == "a"
    assert read(**outside).server.admin_api_key is None


def test_a_settings_file_sets_what_flags_do_not(settings_file) -> None:
    path = settings_file(
        """
        mtp-step: 3
        max_model_len: 32K
        prefix-cache: off
        disable-cuda-graph: true
        enforce-eager: false
        no-async-scheduling: true
        served-model-name: [a, b]
        allowed-origins: "*"
        override-generation-config: {temperature: 0.6, top_k: 20}
        root-path:
        gpu-memory-utilization: 0.5
        """
    )
    command = read("--config", path, "--mtp-step", "1", "--served-model-name", "c")
    engine, server = command.engine, command.server
    assert (engine.mtp_step, engine.max_model_len, engine.prefix_cache) == (1, 32768, "off")
    assert (engine.disable_cuda_graph, engine.overlap, engine.mem_fraction_static) == (True, "off", 0.5)
    assert (server.served_model_name, server.allowed_origins, server.root_path) == (("c",), ("*",), "")
    assert server.override_generation_config == {"temperature": 0.6, "top_k": 20}
    assert read("--config", path).server.served_model_name == ("a", "b")
    assert read("--config", path, "--no-disable-cuda-graph").engine.disable_cuda_graph is False


def test_an_empty_settings_file_changes_nothing(settings_file) -> None:
    assert read("--config", settings_file("# nothing\n")).engine == read().engine


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-model-length: 5", "there is no flag --max-model-length; did you mean --max-model-len?"),
        ("mtp-step: many", "argument --mtp-step: 'many' is not a whole number"),
        ("mtp-step: [1, 2]\nport: [", "is not YAML"),
        ("- mtp-step", "holds a list, it must map flag names to values"),
        ("port: true", "argument --port: 'on' is not a whole number"),
        ("disable-cuda-graph: maybe", "ignored explicit argument 'maybe'"),
        ("config: other.yaml", "config is not a setting; give it on the command line"),
        ("check: true", "check is not a setting"),
        ("5: 6", "there is no flag --5"),
    ],
)
def test_a_mistake_in_a_settings_file_is_one_line_with_its_name(settings_file, text: str, message: str) -> None:
    path = settings_file(text)
    with pytest.raises(ConfigError) as caught:
        read("--config", path)
    assert caught.value.message.startswith(f"--config {path}")
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_a_settings_file_that_is_not_there_or_is_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read: "):
        read("--config", str(tmp_path / "nowhere.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml cannot be read: "):
        read("--config", str(tmp_path / "binary.yaml"))


def test_checking_is_asked_for_by_a_flag() -> None:
    assert read("--check").is_check


def test_the_help_has_groups_and_the_names_of_other_servers() -> None:
    help = " ".join(build_parser().format_help().split())
    for group in (
        "model:",
        "speculation:",
        "scheduling:",
        "memory and prefix cache:",
        "kernels:",
        "reinforcement learning:",
    ):
        assert f" {group} " in help
    assert "(also --max-num-seqs, --running-max-req-size)" in help.replace("- ", "-")
    assert "without effect: --speculative-eagle-topk" in help.replace("- ", "-")
