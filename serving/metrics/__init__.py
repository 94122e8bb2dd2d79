"""What the endpoint counts, and how the counts of all replicas become one text for Prometheus.

Each replica records into its `Metrics` and now and then hands a snapshot to the control actor, which feeds it to
`Merged`. The text is that of all replicas together, whichever of them is asked: Prometheus asks the endpoint's one
address, and Grafana shows it (`cluster.monitoring`).
"""
