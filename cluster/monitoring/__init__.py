"""Prometheus and Grafana for a profile's cluster: `helio cluster monitoring` writes what they start with.

    dashboards/   Grafana's dashboards: of runs, of the cluster, of the endpoint
    rules.yml     alerts

The series come from the agents of Ray's nodes, those of Ray itself as well as what helio records on them
(`cluster.metrics`), and from the endpoint's `GET /metrics`.
"""
