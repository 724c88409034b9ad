"""What `quota.decide` answers, read."""

from __future__ import annotations

import msgspec

from usameter_quota.domain.admission import Finding

_decoder = msgspec.json.Decoder(list[Finding])


def findings_from_json(raw: str | None) -> list[Finding]:
    """The findings, by request; None means that there are none."""
    return [] if raw is None else _decoder.decode(raw)
