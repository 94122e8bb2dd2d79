"""The endpoint's dashboard and alerts ask only for what it tells."""

import json
from typing import Any

import pytest

from cluster.monitoring.command import dashboards, rule_groups
from cluster.monitoring.scrape import prometheus_config
from cluster.profile import load_profile
from serving.config import ServeConfig
from serving.metrics.families import FAMILIES
from tests.expressions import Told, added, check_alerts, check_dashboard, selected, targets, told_by
from tests.serving.test_metrics import ROLLOUT, everything, samples

PROFILE = load_profile("local")


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return dashboards()["endpoint"]


@pytest.fixture(scope="module")
def told() -> Told:
    """The labels of each metric in the endpoint's text, and those that Prometheus adds."""
    (job,) = prometheus_config(PROFILE, ServeConfig())["scrape_configs"]
    found = {name: labels | added(job).keys() for name, labels in told_by(samples(everything(), ROLLOUT)).items()}
    return {**found, "up": set(added(job))}


def test_every_metric_and_label_asked_for_is_told(dashboard: dict[str, Any], told: Told) -> None:
    check_dashboard(dashboard, told)
    for target in targets(dashboard):
        # Without it the dashboard would mix the endpoints that one Prometheus watches.
        assert all('model=~"$model"' in matchers for _, matchers in selected(target["expr"])), target["expr"]
    check_alerts([group for group in rule_groups(PROFILE) if group["name"] == "endpoint"], told)


def test_every_metric_is_shown(dashboard: dict[str, Any]) -> None:
    asked = " ".join(target["expr"] for target in targets(dashboard))
    assert not [name for name in FAMILIES if name not in asked]


def test_the_variables_are_a_data_source_and_the_models_that_there_are(dashboard: dict[str, Any]) -> None:
    source, model = dashboard["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    used = [*(panel for panel in dashboard["panels"] if panel["type"] != "row"), *targets(dashboard), model]
    assert {json.dumps(part["datasource"]) for part in used} == {'{"type": "prometheus", "uid": "${datasource}"}'}
