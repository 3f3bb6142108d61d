"""A checkpoint and settings become a runner on the right device in the right dtype, or one line that says why not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.gpu.dispatch import triton_takes
from models import errors as model_errors
from models.cache import Backends
from models.weights import load_weights
from server.backend.device import choose_device
from server.backend.runner import Runner, build_runner, warm_up_prefill
from server.config import EngineConfig
from server.errors import CheckpointError, ConfigError
from unit_tests.checkpoints import ENDOFTEXT, IM_END, make_checkpoint
from unit_tests.kernels.gpu import fake_flashinfer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("runner"), num_layers=4, mtp_layers=2)


def make_runner(checkpoint: Path, **settings: Any) -> Runner:
    defaults: dict[str, Any] = {"device": "cpu", "num_threads": 1, "max_model_len": 64}
    return build_runner(EngineConfig(model=str(checkpoint), **defaults | settings))


def set_dtype(checkpoint: Path, dtype: str) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": dtype}))


def test_without_speculation_there_is_no_draft_and_no_cache_for_one(checkpoint: Path) -> None:
    runner = make_runner(checkpoint)
    assert runner.draft is None and runner.drafter is None
    assert len(runner.table.cache.kv.data) == 1
    assert runner.table.next_ids.shape[1] == 1


@pytest.mark.parametrize(
    ("mode", "mtp_step", "num_chained"), [("eagle", 3, 1), ("vanilla", 3, 2), ("auto", 3, 2), ("vanilla", 1, 1)]
)
def test_the_mode_says_how_many_draft_layers_are_chained(
    checkpoint: Path, mode: str, mtp_step: int, num_chained: int
) -> None:
    runner = make_runner(checkpoint, mtp_step=mtp_step, mtp_mode=mode)
    assert runner.drafter is not None and runner.drafter.num_layers == num_chained
    assert runner.drafter.num_drafts == mtp_step
    assert len(runner.table.cache.kv.data) == 1 + num_chained


def test_auto_recurses_on_the_only_layer(tmp_path: Path) -> None:
    runner = make_runner(make_checkpoint(tmp_path, num_layers=4), mtp_step=4)
    assert runner.drafter is not None and (runner.drafter.num_layers, runner.drafter.num_drafts) == (1, 4)


def test_rows_and_pages_have_one_more_for_padding(checkpoint: Path) -> None:
    runner = make_runner(checkpoint, max_running_requests=5, mtp_step=1)
    assert len(runner.table.seq_len) == runner.table.cache.gdn.state.shape[1] == 6
    assert runner.table.cache.kv.data.shape[2] == runner.plan.limits.num_pages + 1
    assert runner.table.page_table.shape[1] == runner.plan.max_pages_per_request


def test_weights_are_loaded_and_need_no_gradients(checkpoint: Path) -> None:
    runner = make_runner(checkpoint, mtp_step=1)
    assert runner.draft is not None
    parameters = [*runner.target.parameters(), *runner.draft.parameters()]
    assert not any(parameter.requires_grad for parameter in parameters)
    held = [parameter.clone() for parameter in parameters]
    load_weights(checkpoint, runner.target, runner.draft, show_progress=False)
    assert all(torch.equal(one, other) for one, other in zip(held, parameters, strict=True))


@pytest.mark.parametrize(
    ("written", "asked", "expected"),
    [
        ("bfloat16", "auto", torch.bfloat16),
        ("float32", "auto", torch.float32),
        ("float16", "auto", torch.float32),
        ("float32", "bfloat16", torch.bfloat16),
        ("bfloat16", "float64", torch.float64),
    ],
)
def test_the_dtype_is_the_checkpoints_unless_asked_for(
    tmp_path: Path, written: str, asked: str, expected: torch.dtype
) -> None:
    make_checkpoint(tmp_path, num_layers=4, dtype="float32" if written == "float16" else written)
    set_dtype(tmp_path, written)
    runner = make_runner(tmp_path, dtype=asked, mtp_step=1)
    assert runner.draft is not None
    for weight in (runner.target.embed_tokens.weight, runner.draft.fc.weight, runner.table.cache.kv.data):
        assert weight.dtype == expected
    assert runner.table.cache.gdn.state.dtype == torch.promote_types(expected, torch.float32)


def test_a_dtype_that_is_not_served_is_named_with_those_that_are(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, num_layers=4)
    set_dtype(tmp_path, "float8_e4m3fn")
    with pytest.raises(ConfigError, match=r"config.json: dtype 'float8_e4m3fn' is not served, .*--dtype: bfloat16"):
        make_runner(tmp_path)
    assert make_runner(tmp_path, dtype="float32").target.embed_tokens.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "has_cuda", "expected"),
    [("auto", False, "cpu"), ("auto", True, "cuda"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_the_device_is_the_one_asked_for_or_the_best_there_is(
    monkeypatch: pytest.MonkeyPatch, name: str, has_cuda: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr("server.backend.device.check_gpu", lambda *args: None)
    for name_of in ("get_device_name", "get_device_capability", "get_arch_list"):
        monkeypatch.setattr(torch.cuda, name_of, lambda: None)
    assert choose_device(name) == expected


def test_cuda_without_a_device_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError) as caught:
        make_runner(Path("/nowhere"), device="cuda")
    assert caught.value.message == "--device is cuda, torch sees no CUDA device here: use --device cpu"


def test_the_number_of_threads_is_set(checkpoint: Path) -> None:
    before = torch.get_num_threads()
    try:
        make_runner(checkpoint, num_threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_stop_ids_are_the_checkpoints_and_only_those_in_its_vocabulary(checkpoint: Path, tmp_path: Path) -> None:
    assert make_runner(checkpoint).eos_ids == (ENDOFTEXT, IM_END)
    runner = make_runner(make_checkpoint(tmp_path, num_layers=4, vocab_size=ENDOFTEXT + 1))
    assert runner.eos_ids == runner.sampler.eos_ids == (ENDOFTEXT,)


@pytest.mark.parametrize(
    ("damage", "settings", "message"),
    [
        ("config.json", {}, "config.json does not exist"),
        ("model.safetensors", {}, r"no \*\.safetensors file"),
        (None, {"mtp_step": 1}, "--mtp-step 0"),
    ],
)
def test_a_checkpoint_that_cannot_be_served_is_one_line_of_the_servers_own_error(
    tmp_path: Path, damage: str | None, settings: dict[str, int], message: str
) -> None:
    make_checkpoint(tmp_path, num_layers=4, mtp_layers=0)
    if damage is not None:
        (tmp_path / damage).unlink()
    with pytest.raises(CheckpointError, match=message) as caught:
        make_runner(tmp_path, **settings)
    assert isinstance(caught.value, ConfigError) and "\n" not in caught.value.message
    assert isinstance(caught.value.__cause__, model_errors.CheckpointError)


def test_a_memory_plan_that_does_not_fit_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, num_layers=4)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="--max-total-tokens"):
        make_runner(tmp_path, max_total_tokens=8)


def test_dummy_weights_need_no_file_but_the_config(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    with pytest.raises(ConfigError):
        make_runner(tmp_path)
    runner = make_runner(tmp_path, load_format="dummy", mtp_step=1)
    assert runner.draft is not None
    assert all(weight.isfinite().all() for model in (runner.target, runner.draft) for weight in model.parameters())


@pytest.mark.parametrize(
    ("attention", "gdn"), [("flashinfer", "flashinfer"), ("flashinfer", "triton"), ("auto", "flashinfer")]
)
def test_flashinfer_is_compiled_at_start_and_decode_steps_are_whole(
    checkpoint: Path, attention: str, gdn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake: Any = fake_flashinfer.install(monkeypatch)
    monkeypatch.setattr("server.backend.device._check_flashinfer", lambda *args: None)
    with triton_takes("cpu"):
        runner = make_runner(checkpoint, attention_backend=attention, gdn_backend=gdn, mtp_step=1)
    cache = runner.table.cache
    assert cache.backends == Backends(attention.replace("auto", "triton"), gdn)
    assert runner.decode is not None and cache.scratch is not None
    assert (cache.planner is not None) == (attention == "flashinfer")
    compiled = {name for name, _, _ in fake.calls}
    assert ("plan" in compiled, "chunk_gated_delta_rule" in compiled) == (
        attention == "flashinfer",
        gdn == "flashinfer",
    )


@pytest.mark.parametrize("flag", ["attention_backend", "gdn_backend"])
def test_flashinfer_that_cannot_compile_is_one_line(
    checkpoint: Path, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Ninja build failed. Ninja output:\n[1/64] nvcc")

    fake: Any = fake_flashinfer.install(monkeypatch)
    monkeypatch.setattr("server.backend.device._check_flashinfer", lambda *args: None)
    fake.chunk_gated_delta_rule = fake.BatchPrefillWithPagedKVCacheWrapper = fail
    with triton_takes("cpu"), pytest.raises(ConfigError) as caught:
        make_runner(checkpoint, **{flag: "flashinfer"})
    assert caught.value.message == (
        "FlashInfer's kernels cannot be compiled here (Ninja build failed. Ninja output:): use the triton backends"
    )


@pytest.mark.parametrize("takes", ["cpu", "cuda"])
def test_the_warm_up_runs_every_layer_and_leaves_a_new_row(checkpoint: Path, takes: str) -> None:
    """With Triton's kernels and with torch's."""
    with triton_takes(takes):
        runner = make_runner(checkpoint, mtp_step=2)
        warm_up_prefill(runner.target, runner.draft, runner.table, runner.sampler, 8)
    gdn, kv = runner.table.cache.gdn, runner.table.cache.kv.data
    assert len(kv) == 3 and all(layer[:, 0].any() and not layer[:, 1:].any() for layer in kv), "on the padding page"
    assert all(not tensor[:, 1].any() for tensor in (gdn.state, *gdn.ring, gdn.conv_ring))
    assert runner.table.seq_len[1] == 0 and runner.table.accept_len[1] == 0
