"""What the caller is told: how a request fared, and where its API key stands then."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from usameter_core.errors import RateLimited
from usameter_core.ratelimit.windows import Decision, WindowState

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Standing:
    """How a request fared, by the window that binds most: the least remaining, then the longest to free.

    Attributes:
        limit: Requests that this window admits.
        remaining: Of them, after all that was decided with this request; 0 for a refused one.
        reset_at: When one more fits than now, in whole seconds; for a refused request, when it fits.
        reset_seconds: Until then, rounded up.
        metadata: The same as headers of the answer.
    """

    admitted: bool
    limit: int
    remaining: int
    reset_at: datetime
    reset_seconds: int
    metadata: Metadata

    def require_admitted(self) -> None:
        """Return if the request was admitted; else raise RateLimited."""
        if not self.admitted:
            raise RateLimited(limit=self.limit, reset_at=self.reset_at, retry_after_seconds=self.reset_seconds)


def standings_of(decision: Decision, requests: int) -> list[Standing]:
    """One for each of the requests that were decided, the admitted ones first."""
    refused = requests - decision.admitted
    standings = [_standing(decision, admitted=True)] * decision.admitted if decision.admitted else []
    return standings + ([_standing(decision, admitted=False)] * refused if refused else [])


def _standing(decision: Decision, *, admitted: bool) -> Standing:
    binding = min(decision.windows, key=lambda window: (window.remaining, -window.frees_at_us))
    reset_at = _EPOCH + timedelta(seconds=_whole_seconds(binding.frees_at_us))
    reset_seconds = _whole_seconds(binding.frees_at_us - decision.now_us)
    return Standing(
        admitted=admitted,
        limit=binding.limit.requests,
        remaining=binding.remaining,
        reset_at=reset_at,
        reset_seconds=reset_seconds,
        metadata=_metadata(decision, binding, reset_at, reset_seconds, admitted=admitted),
    )


def _whole_seconds(microseconds: int) -> int:
    """Rounded up: who comes back then is never too early."""
    return -(-microseconds // 1_000_000)


def _metadata(
    decision: Decision, binding: WindowState, reset_at: datetime, reset_seconds: int, *, admitted: bool
) -> Metadata:
    """The headers, in three vocabularies, because clients know different ones.

    The structured fields of draft-ietf-httpapi-ratelimit-headers-11, the three fields of that draft up to 06, and
    the ones from before it, whose reset is a Unix time. They go in initial metadata: the draft forbids
    them in trailers, and any edge passes initial metadata on as headers.
    """
    limits = [window.limit for window in decision.windows]
    policy = ", ".join(f'"{limit.name}";q={limit.requests};w={limit.window.seconds}' for limit in limits)
    headers = (
        ("ratelimit-policy", policy),
        ("ratelimit", f'"{binding.limit.name}";r={binding.remaining};t={reset_seconds}'),
        ("ratelimit-limit", str(binding.limit.requests)),
        ("ratelimit-remaining", str(binding.remaining)),
        ("ratelimit-reset", str(reset_seconds)),
        ("x-ratelimit-limit", str(binding.limit.requests)),
        ("x-ratelimit-remaining", str(binding.remaining)),
        ("x-ratelimit-reset", str(int(reset_at.timestamp()))),
    )
    return headers if admitted else (*headers, ("retry-after", str(reset_seconds)))
