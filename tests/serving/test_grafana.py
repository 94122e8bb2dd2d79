"""The dashboard asks only for what the endpoint tells, and can be drawn."""

import itertools
import json
import re
from collections import defaultdict
from typing import Any

import pytest
import yaml

from serving.config import ServeConfig
from serving.metrics.families import FAMILIES
from tests.serving.test_metrics import ROLLOUT, SERVING, everything, families

SELECTOR = re.compile(r"(helio_\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"')
GROUPING = re.compile(r"\b(?:by|without|on|ignoring) \(([^)]*)\)")
AGGREGATION = re.compile(r"\b(?:sum|count|max|min|avg|histogram_quantile)\b")
LEGEND = re.compile(r"\{\{(\w+)\}\}")

Told = dict[str, set[str]]


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((SERVING / "grafana.json").read_text())
    return found


@pytest.fixture(scope="module")
def told() -> Told:
    """The labels of each metric in the endpoint's text."""
    labels: Told = defaultdict(set)
    for family in families(everything(), ROLLOUT):
        for sample in family.samples:
            labels[sample.name] |= set(sample.labels)
    return labels


def targets(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [target for panel in dashboard["panels"] for target in panel.get("targets", [])]


def test_every_metric_and_label_asked_for_is_told(dashboard: dict[str, Any], told: Told) -> None:
    for target in targets(dashboard):
        expression = target["expr"]
        asked = SELECTOR.findall(expression)
        assert asked, expression
        for name, matchers in asked:
            assert name in told, expression
            assert set(MATCHER.findall(matchers)) <= told[name], expression
            # Without it the dashboard would mix the endpoints that one Prometheus watches.
            assert 'model=~"$model"' in matchers, expression
        common = set.intersection(*(told[name] for name, _ in asked))
        grouped = {label for labels in GROUPING.findall(expression) for label in re.split(r",\s*", labels)}
        assert grouped <= common, expression
        left = grouped if AGGREGATION.search(expression) else common
        assert set(LEGEND.findall(target["legendFormat"])) <= left, target


def test_every_metric_is_shown(dashboard: dict[str, Any]) -> None:
    asked = " ".join(target["expr"] for target in targets(dashboard))
    assert not [name for name in FAMILIES if name not in asked]


def test_the_variables_are_a_data_source_and_the_models_that_there_are(dashboard: dict[str, Any], told: Told) -> None:
    source, model = dashboard["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", model["query"]["query"])
    assert asked and asked[2] in told[asked[1]]
    used = [*(panel for panel in dashboard["panels"] if panel["type"] != "row"), *targets(dashboard), model]
    assert {json.dumps(part["datasource"]) for part in used} == {'{"type": "prometheus", "uid": "${datasource}"}'}


def test_panels_have_names_of_their_own_and_do_not_overlap(dashboard: dict[str, Any]) -> None:
    assert dashboard["title"] and dashboard["uid"] and dashboard["schemaVersion"] >= 42
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        x, y, width, height = (panel["gridPos"][key] for key in "xywh")
        assert x >= 0 and x + width <= 24, panel["title"]
        cells = set(itertools.product(range(x, x + width), range(y, y + height)))
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["title"]
        references = [target["refId"] for target in panel.get("targets", [])]
        assert len(set(references)) == len(references)


def test_the_example_for_prometheus_asks_the_endpoint_where_it_is() -> None:
    (job,) = yaml.safe_load((SERVING / "prometheus.yml").read_text())["scrape_configs"]
    config = ServeConfig()
    assert job["static_configs"] == [{"targets": [f"{config.host}:{config.port}"]}]
