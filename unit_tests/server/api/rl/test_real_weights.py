"""A real engine with drafts behind the routes of trainers: its weights change while requests run."""

import asyncio
import base64
import json
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch

from server.config import ServerConfig
from server.tokenizer import Tokenizer
from unit_tests.checkpoints import make_checkpoint
from unit_tests.server.api.conftest import Serving
from unit_tests.server.engines import make_engine

DISK, TENSOR = "/update_weights_from_disk", "/update_weights_from_tensor"
PROMPTS = [[5, 6, 7], [70, 71, 72, 73, 74, 75, 76, 77, 78], list(range(100, 140))]
# So many that no request ends while a command is on its way.
NUM_TOKENS = 240
GREEDY = {"temperature": 0, "ignore_eos": True, "max_new_tokens": NUM_TOKENS}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of one shape; the second has other weights, target's and draft head's."""
    root = tmp_path_factory.mktemp("weights")
    return [make_checkpoint(root / str(seed), num_layers=4, close_draft=True, seed=seed) for seed in (0, 1)]


def serve(checkpoint: Path) -> Serving:
    """A serving of a real engine that drafts."""
    engine = make_engine(checkpoint, mtp_step=3, prefix_cache="on", checkpoint_interval=32, page_size=8)
    return Serving(engine, Tokenizer(checkpoint), config=ServerConfig(enable_rl=True), engine_config=engine.config)


@pytest.fixture
def serving(checkpoints: list[Path]) -> Serving:
    """Serves the first checkpoint."""
    return serve(checkpoints[0])


@pytest.fixture(scope="module")
def cold(checkpoints: list[Path]) -> Iterator[Serving]:
    """Has served the second checkpoint from the start."""
    serving = serve(checkpoints[1])
    with serving.listening():
        yield serving


def body(prompt: list[int], **fields: Any) -> dict[str, Any]:
    """A greedy request with log-probabilities."""
    return {"input_ids": prompt, "sampling_params": GREEDY, "return_logprob": True, **fields}


def run(serving: Serving, talk: Callable[[httpx.AsyncClient], Coroutine[Any, Any, Any]]) -> Any:
    """What `talk` gives while the engine runs."""

    async def run_all() -> Any:
        transport = httpx.ASGITransport(serving.app)
        async with serving.delivering(), httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await talk(http)

    return asyncio.run(asyncio.wait_for(run_all(), 60))


async def until_running(serving: Serving, num_tokens: int) -> None:
    """Return when the engine has made so many tokens."""
    while serving.client.stats.num_output_tokens < num_tokens:
        await asyncio.sleep(0)


def check_spans(answer: dict[str, Any], versions: list[str]) -> list[dict[str, Any]]:
    """The spans of an answer, which must cover its tokens in the order of the versions."""
    meta = answer["meta_info"]
    spans: list[dict[str, Any]] = meta["weight_versions"]
    assert [span["version"] for span in spans] == versions and meta["weight_version"] == versions[-1]
    edges = [0, *(span["end"] for span in spans)]
    assert [span["start"] for span in spans] == edges[:-1] and edges == sorted(set(edges))
    assert edges[-1] == len(answer["output_ids"]) == len(meta["output_token_logprobs"])
    return spans


def check_as_cold(cold: Serving, prompt: list[int], answer: dict[str, Any], start: int) -> None:
    """Tokens and log-probabilities from `start` on are those of the new weights for what stands before them."""
    ids, scores = answer["output_ids"], answer["meta_info"]["output_token_logprobs"]
    rest = {**GREEDY, "max_new_tokens": len(ids) - start}
    expected = cold.http.post("/generate", json=body(prompt + ids[:start], sampling_params=rest)).json()
    assert ids[start:] == expected["output_ids"]
    found = [score[0] for score in scores[start:]]
    assert found == pytest.approx([score[0] for score in expected["meta_info"]["output_token_logprobs"]], abs=1e-6)


def ask_all(http: httpx.AsyncClient) -> list["asyncio.Task[httpx.Response]"]:
    """All prompts at once."""
    return [asyncio.create_task(http.post("/generate", json=body(prompt))) for prompt in PROMPTS]


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_every_token_has_the_version_that_made_it(
    serving: Serving, cold: Serving, checkpoints: list[Path], mode: str
) -> None:
    async def talk(http: httpx.AsyncClient) -> Any:
        tasks = ask_all(http)
        await until_running(serving, 20)
        assert (await http.post("/pause_generation", json={"mode": mode})).json()["num_requests"] == 3
        update = {"model_path": str(checkpoints[1]), "weight_version": "v1"}
        answer = (await http.post(DISK, json=update)).json()
        assert (answer["success"], answer["weight_version"], answer["num_paused_requests"]) == (True, "v1", 3), answer
        await http.post("/continue_generation")
        answers = [(await task).json() for task in tasks]
        fresh = [(await http.post("/generate", json=body(prompt))).json() for prompt in PROMPTS]
        return answers, fresh, (await http.get("/model_info")).json()

    answers, fresh, info = run(serving, talk)
    assert (info["weight_version"], info["mtp_weight_version"], info["mtp_stale"]) == ("v1", "v1", False)
    assert set(info["drafts_by_version"]) == {"default", "v1"}
    for prompt, answer, after in zip(PROMPTS, answers, fresh, strict=True):
        (_, second) = check_spans(answer, ["default", "v1"])
        if mode == "retract":
            check_as_cold(cold, prompt, answer, second["start"])
        check_spans(after, ["v1"])
        check_as_cold(cold, prompt, after, 0)


def test_an_update_amid_requests_waits_for_none(serving: Serving, checkpoints: list[Path]) -> None:
    """New requests come as long as it takes, and every one of them ends."""

    async def talk(http: httpx.AsyncClient) -> Any:
        update = {"model_path": str(checkpoints[1]), "weight_version": "v1"}
        changing = asyncio.create_task(http.post(DISK, json=update))
        answers = []
        while not changing.done():
            answers += [(await task).json() for task in ask_all(http)]
        assert (await changing).json()["success"]
        return answers

    answers = run(serving, talk)
    assert answers
    for answer in answers:
        versions = [span["version"] for span in answer["meta_info"]["weight_versions"]]
        assert versions == sorted(versions) and set(versions) <= {"default", "v1"}
        check_spans(answer, versions)
        assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": NUM_TOKENS}


def test_a_pause_returns_what_there_is_and_later_requests_get_the_new_weights(
    serving: Serving, cold: Serving, checkpoints: list[Path]
) -> None:
    async def talk(http: httpx.AsyncClient) -> Any:
        tasks = ask_all(http)
        await until_running(serving, 20)
        assert (await http.post("/pause_generation", json={"mode": "abort"})).json()["num_requests"] == 3
        answers = [(await task).json() for task in tasks]
        waiting = ask_all(http)
        assert (await http.get("/is_paused")).json() == {"is_paused": True}
        for _ in range(2):
            assert (await http.post(DISK, json={"model_path": str(checkpoints[1])})).json()["success"]
        assert not any(task.done() for task in waiting)
        assert (await http.post("/continue_generation")).json()["success"]
        return answers, [(await task).json() for task in waiting]

    answers, later = run(serving, talk)
    for prompt, answer, after in zip(PROMPTS, answers, later, strict=True):
        assert answer["meta_info"]["finish_reason"]["type"] == "abort"
        check_spans(answer, ["default"])
        check_spans(after, ["2"])
        check_as_cold(cold, prompt, after, 0)


def test_tensors_come_in_parts_and_wrong_ones_change_nothing(serving: Serving, checkpoints: list[Path]) -> None:
    old, new = (safetensors.torch.load_file(path / "model.safetensors") for path in checkpoints)

    def inline(tensors: dict[str, torch.Tensor], **fields: Any) -> dict[str, Any]:
        return {"serialized_named_tensors": [base64.b64encode(safetensors.torch.save(tensors)).decode()], **fields}

    head = {name: tensor for name, tensor in new.items() if name.startswith("mtp.")}
    trunk = {name: tensor for name, tensor in new.items() if name not in head}
    name, other = next(iter(head)), next(iter(trunk))
    with serving.listening():
        post = serving.http.post
        for wrong in ({"no.such.weight": new[name]}, {name: new[name], other: new[other].flatten()[:-1].clone()}):
            refused = post(TENSOR, json=inline(wrong))
            assert refused.status_code == 400 and next(reversed(wrong)) in refused.json()["message"], refused.text
        refused = post(TENSOR, json=inline(head, partial=False))
        assert refused.status_code == 400 and "the update lacks " in refused.json()["message"]
        assert post("/get_weights_by_name", json={"name": name}).json() == old[name].flatten()[:100].tolist()
        assert serving.http.get("/get_weight_version").json() == {"weight_version": "default"}
        answer = post(TENSOR, json=inline(trunk, weight_version="t"))
        assert answer.json()["success"], answer.text
        assert serving.http.get("/weight_info").json()["mtp_stale"] is True
        assert post(TENSOR, json=inline(head, weight_version="t")).json()["success"]
        assert serving.http.get("/weight_info").json()["mtp_stale"] is False
        for part in (head, trunk):
            assert post(TENSOR, json=inline(part, weight_version="u")).json()["success"]
        assert serving.http.get("/weight_info").json()["mtp_stale"] is False
        values = post("/get_weights_by_name", json={"name": name, "truncate_size": 3}).json()
        assert values == new[name].flatten()[:3].tolist()
        checked = post("/weight_checker", json={"action": "checksum"}).json()
        assert post("/weight_checker", json={"action": "compare", "baseline": checked["checksums"]}).json()["match"]


@pytest.mark.parametrize("mode", ["abort", "retract"])
def test_requests_that_wait_outlast_a_release_of_memory(serving: Serving, mode: str) -> None:
    """Those that came while the engine was paused, and those that a pause has put back."""

    async def talk(http: httpx.AsyncClient) -> Any:
        expected = [(await task).json()["output_ids"] for task in ask_all(http)]
        running = ask_all(http)
        await until_running(serving, serving.client.stats.num_output_tokens + 20)
        assert (await http.post("/pause_generation", json={"mode": mode})).json()["success"]
        late = ask_all(http)
        while serving.client.num_in_flight < (3 if mode == "abort" else 6):
            await asyncio.sleep(0)
        assert (await http.post("/release_memory_occupation")).json()["success"]
        assert (await http.post("/resume_memory_occupation")).json()["success"]
        assert (await http.get("/is_paused")).json() == {"is_paused": True}
        assert (await http.post("/continue_generation")).json()["success"]
        return expected, [(await task).json() for task in running], [(await task).json() for task in late]

    expected, ended, late = run(serving, talk)
    assert [answer["output_ids"] for answer in late] == expected
    for answer, ids in zip(ended, expected, strict=True):
        count = len(answer["output_ids"])
        assert answer["output_ids"] == ids[:count] and (count == len(ids)) is (mode == "retract")


def test_sleep_and_waking_up_change_no_answer(serving: Serving) -> None:
    with serving.listening():
        post = serving.http.post
        before = post("/generate", json=body(PROMPTS[1])).json()
        for tags in (["weights", "kv_cache"], ["kv_cache", "weights"]):
            assert post("/sleep?level=1").json()["success"]
            assert serving.http.get("/is_sleeping").json() == {"is_sleeping": True}
            for tag in tags:
                assert post("/wake_up", params={"tags": tag}).json()["success"]
            assert serving.http.get("/is_sleeping").json() == {"is_sleeping": False}
            after = post("/generate", json=body(PROMPTS[1])).json()
            assert json.dumps(after["output_ids"]) == json.dumps(before["output_ids"])
