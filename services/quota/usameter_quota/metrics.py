"""Metrics of quota."""

from __future__ import annotations

from prometheus_client import Counter

WEBHOOK_ATTEMPTS = Counter(
    "usameter_quota_webhook_attempts_total",
    "Attempts to deliver a webhook message by outcome: delivered, failed (to be tried again) or given_up.",
    ["outcome"],
)
