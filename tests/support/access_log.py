"""A real access log as input, or one of the same form where it is not there; and what it comes to, computed plainly.

The computation here shares no code with the platform: a regular expression, sums of Decimals, and the three
tiers written out.
"""

from __future__ import annotations

import gzip
import random
import re
from collections import defaultdict
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

REAL_LOG = Path(__file__).parents[3] / "shared" / "data" / "access.log.gz"
CENT = Decimal("0.01")
_LINE = re.compile(r'^(\S+) \S+ \S+ \[[^\]]+\] "(?:[^"\\]|\\.)*" \d{3} (\d+|-)')

PRICES = {
    "api_request": [("100", "0.01"), ("300", "0.008"), (None, "0.005")],
    "egress_mb": [("10", "0.12"), ("100", "0.09"), (None, "0.05")],
}


@dataclass(slots=True)
class Expected:
    """What the log comes to."""

    requests: int = 0
    transfers: int = 0
    use: dict[str, dict[str, Decimal]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(Decimal)))

    @property
    def tenants(self) -> int:
        return len(self.use)

    def total_quantity(self, event_type: str) -> Decimal:
        return sum((use[event_type] for use in self.use.values()), Decimal(0))

    def invoice_total(self, tenant: str) -> Decimal:
        return sum((line_amount(kind, quantity) for kind, quantity in self.use[tenant].items()), Decimal(0))


def expected_of(lines: list[str]) -> Expected:
    """What an access log in combined format comes to."""
    expected = Expected()
    for line in lines:
        match = _LINE.match(line)
        assert match is not None, line
        tenant, size = match.groups()
        expected.requests += 1
        expected.use[tenant]["api_request"] += 1
        if size not in {"-", "0"}:
            expected.transfers += 1
            expected.use[tenant]["egress_mb"] += Decimal(size) / 1_000_000
    return expected


def line_amount(event_type: str, quantity: Decimal) -> Decimal:
    """A quantity's price: each unit at its tier's rate, rounded once."""
    amount, lower = Decimal(0), Decimal(0)
    for up_to, rate in PRICES[event_type]:
        upper = quantity if up_to is None else min(quantity, Decimal(up_to))
        amount += max(upper - lower, Decimal(0)) * Decimal(rate)
        lower = max(lower, upper)
    return amount.quantize(CENT, ROUND_HALF_UP)


def read_log(path: Path) -> list[str]:
    """The lines of a log."""
    with gzip.open(path, "rt", encoding="utf-8", errors="surrogateescape") as opened:
        return opened.read().splitlines()


def access_log(directory: Path) -> Path:
    """The real log where it is there, else one of the same form and size."""
    if REAL_LOG.is_file():
        return REAL_LOG
    made = directory / "access.log.gz"
    with gzip.open(made, "wt", encoding="utf-8") as opened:
        opened.write("\n".join(_made_lines(random.Random(20150517))) + "\n")
    return made


def _made_lines(source: random.Random) -> list[str]:
    tenants = [f"203.0.{number // 256}.{number % 256}" for number in range(1_750)]
    # One heavy user, who reaches the third tier, and every line of one kind of awkwardness.
    tenants += ["66.249.73.135"] * 90 + ["2001:db8::7"] * 20
    agents = ["Mozilla/5.0", 'Bot \\"quoted\\"', "-"]
    lines = []
    for number in range(10_000):
        size = source.choice(["-", "0", *[str(source.randrange(1, 5_000_000))] * 20])
        lines.append(
            f"{source.choice(tenants)} - - [{17 + number // 2_500}/May/2015:{number % 24:02}:05:03 +0000] "
            f'"GET /page/{number % 97} HTTP/1.1" 200 {size} "-" "{source.choice(agents)}"'
        )
    return lines
