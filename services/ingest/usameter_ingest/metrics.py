"""Metrics of ingest."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

EVENTS = Counter(
    "usameter_ingest_events_total",
    "Events by what became of them: new, duplicate, conflict or over_quota.",
    ["outcome"],
)
KNOWN_EVENTS = Counter(
    "usameter_ingest_known_events_total",
    "Stored events that were sent again, by where they were found: cache or database.",
    ["source"],
)
KNOWN_EVENTS_DROPPED = Counter(
    "usameter_ingest_known_events_dropped_total",
    "Stored events that were not cached, since Redis was away or too many waited for it.",
)
LIVE_EVENTS_DROPPED = Counter(
    "usameter_ingest_live_events_dropped_total",
    "Recorded events that live usage lacks, since Redis was away for too long.",
)
SEAL_SECONDS = Histogram(
    "usameter_ingest_seal_seconds", "Seconds that sealing an epoch took.", buckets=(0.01, 0.1, 1, 10, 60, 600)
)
