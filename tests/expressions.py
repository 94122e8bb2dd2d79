"""PromQL of dashboards and alerts: which series and labels it asks for, held against those that are told."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

SELECTOR = re.compile(r"\b((?:helio|ray|autoscaler)_\w+|up)\b(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"')
GROUPING = re.compile(r"\b(?:by|without|on|ignoring) \(([^)]*)\)")
AGGREGATION = re.compile(r"\b(?:sum|count|max|min|avg|histogram_quantile)\b")
LEGEND = re.compile(r"\{\{(\w+)\}\}")
OF_THE_ALERT = re.compile(r"\$labels\.(\w+)")

Told = dict[str, set[str]]
"""The labels of each series, by its name."""
Series = tuple[str, frozenset[tuple[str, str]]]
"""Its name and labels."""


def selected(expression: str) -> list[tuple[str, str]]:
    """(name, matchers) of each series that an expression asks for."""
    # Labels may be called as series are.
    return SELECTOR.findall(GROUPING.sub("", expression))


def labels_left(expression: str, told: Told) -> set[str]:
    """The labels of what an expression gives, once it was found that all it asks for is told."""
    asked = selected(expression)
    assert asked, expression
    for name, matchers in asked:
        assert name in told, f"{name} in {expression}"
        assert set(MATCHER.findall(matchers)) <= told[name], expression
    common = set.intersection(*(told[name] for name, _ in asked))
    grouped = {label for labels in GROUPING.findall(expression) for label in re.split(r",\s*", labels)}
    assert grouped <= common, expression
    return grouped if AGGREGATION.search(expression) else common


def check_dashboard(dashboard: dict[str, Any], told: Told) -> None:
    """Every query of a dashboard and its variables names what is told, and each legend a label that is left."""
    for target in targets(dashboard):
        left = labels_left(target["expr"], told)
        assert set(LEGEND.findall(target["legendFormat"])) <= left, target
    for variable in dashboard["templating"]["list"][1:]:
        asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert asked is not None
        assert asked[2] in labels_left(asked[1], told)


def check_alerts(groups: list[dict[str, Any]], told: Told) -> None:
    """Every alert's expression names what is told, and its texts labels that are left."""
    for rule in (rule for group in groups for rule in group["rules"]):
        left = labels_left(rule["expr"], told)
        assert set(OF_THE_ALERT.findall(" ".join(rule["annotations"].values()))) <= left, rule["alert"]


def targets(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The queries of a dashboard."""
    for panel in dashboard["panels"]:
        yield from panel.get("targets", [])


def scraped(text: str, job: dict[str, Any]) -> dict[Series, float]:
    """What Prometheus has of a target's text, relabelled as the job of its configuration says."""
    found: dict[Series, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {"__name__": sample.name, **sample.labels}
            for rule in job.get("metric_relabel_configs", ()):
                _relabel(labels, rule)
            found[labels.pop("__name__"), frozenset((labels | added(job)).items())] = sample.value
    return found


def added(job: dict[str, Any]) -> dict[str, str]:
    """The labels that Prometheus gives to all of a job's series."""
    labels = {"job": job["job_name"], "instance": "host:port"}
    for static in job.get("static_configs", ()):
        labels |= static.get("labels", {})
    for rule in job.get("relabel_configs", ()):
        _relabel(labels, rule)
    return labels


def told_by(series: Iterable[Series]) -> Told:
    """The labels of each name."""
    found: Told = defaultdict(set)
    for name, labels in series:
        found[name] |= {label for label, _ in labels}
    return found


def _relabel(labels: dict[str, str], rule: dict[str, Any]) -> None:
    if rule.get("action") == "labeldrop":
        for label in [label for label in labels if re.fullmatch(rule["regex"], label)]:
            del labels[label]
        return
    assert rule.keys() <= {"source_labels", "regex", "target_label", "replacement"}
    source = ";".join(labels.get(label, "") for label in rule.get("source_labels", ()))
    if match := re.fullmatch(rule.get("regex", "(.*)"), source):
        replacement = re.sub(r"\$(\d)", r"\\\1", rule.get("replacement", "$1"))
        labels[rule["target_label"]] = match.expand(replacement)
