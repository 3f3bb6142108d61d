"""Every query of the dashboard is about metrics that a server has, by labels that they have."""

import json
import re
from pathlib import Path
from typing import Any

import prometheus_client.parser
import pytest
import yaml

from server.api.metrics import Metrics
from server.messages import EngineStats, Ready, SamplingParams

FOLDER = Path(__file__).resolve().parent.parent / "dashboards"
METRIC = re.compile(r"\b(?:tandem:|vllm:|http_)[a-z0-9_]+")
GROUPED = re.compile(r"by \(([a-z_, ]+)\)")
# Metrics of what has happened, by kind.
STATS = EngineStats(
    accepted_per_position=(1,),
    proposed_per_position=(1,),
    requests_per_depth=(1,),
    cache_misses={"too short": 1},
    faults={"non_finite": 1},
    drafts_by_version={"default": ((1,), (1,))},
)


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    return json.loads((FOLDER / "tandem.json").read_text())


@pytest.fixture(scope="module")
def labels() -> dict[str, set[str]]:
    """The labels of every sample of a server that has done a little of everything."""
    metrics = Metrics("m", lambda: STATS, Ready(1, 1, (), 1))
    clock = metrics.start_request(1, SamplingParams())
    for _ in range(2):
        clock.count_tokens(1)
    clock.end("stop")
    metrics.observe_http("GET", "/health", 200, 0.1)
    families = prometheus_client.parser.text_string_to_metric_families(metrics.render().decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def expressions(dashboard: dict[str, Any]) -> list[str]:
    """All queries."""
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_every_metric_that_is_queried_is_there(dashboard: dict[str, Any], labels: dict[str, set[str]]) -> None:
    names = [name for expression in expressions(dashboard) for name in METRIC.findall(expression)]
    assert len(set(names)) > 30
    assert {name for name in names if name not in labels} == set()


def test_queries_group_by_labels_that_their_metrics_have(
    dashboard: dict[str, Any], labels: dict[str, set[str]]
) -> None:
    for expression in expressions(dashboard):
        wanted = {label.strip() for group in GROUPED.findall(expression) for label in group.split(",")}
        for name in METRIC.findall(expression):
            assert wanted <= labels[name], expression
            assert ("model_name" in labels[name]) == ('{model_name=~"$model"}' in expression), expression


def test_speculation_has_its_panels(dashboard: dict[str, Any]) -> None:
    titles = {panel["title"] for panel in dashboard["panels"]}
    assert {"Acceptance rate", "Accept length", "Acceptance by position", "Cache", "Throughput"} <= titles


def test_panels_have_places_of_their_own_and_queries_have_names(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references) > 0
        assert all(target["legendFormat"] for target in panel["targets"])


def test_it_may_be_provisioned_for_any_data_source(dashboard: dict[str, Any]) -> None:
    assert dashboard["uid"] and "id" not in dashboard
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {"${datasource}"}
    (provider,) = yaml.safe_load((FOLDER / "grafana.yaml").read_text())["providers"]
    assert provider["type"] == "file" and provider["options"]["path"]
