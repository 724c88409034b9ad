"""Metrics that every service has, and the door they are read through."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram, start_http_server

# A tenant is never a label: their number has no bound.
CALL_SECONDS = Histogram(
    "usameter_grpc_call_seconds",
    "Seconds a call took, by method and gRPC status code.",
    ["method", "code"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
CIRCUIT_OPEN = Gauge("usameter_circuit_open", "1 while calls to a dependency are not even tried.", ["dependency"])
RATE_LIMIT_DECISIONS = Counter(
    "usameter_rate_limit_decisions_total",
    "Requests of API keys with a rate limit, by where they were counted (in memory while Redis is away) and outcome.",
    ["counted_by", "outcome"],
)
INVARIANT_VIOLATIONS = Counter(
    "usameter_invariant_violations_total", "Times that stored numbers contradicted each other.", ["invariant"]
)
LAST_CLEAN_AUDIT = Gauge(
    "usameter_last_clean_audit_timestamp_seconds",
    "When an audit of some organization last ended here without a violation, by what was audited.",
    ["audited"],
)


def serve_metrics(port: int, *, worker: int = 0) -> None:
    """Answer Prometheus on `port`, from a thread of its own; 0: not at all.

    Workers that share the service's port each have their own here, counted up from `port`: sums are
    Prometheus's to make, as for replicas, and which worker has how much to do stays visible.
    """
    if port:
        start_http_server(port + worker)
