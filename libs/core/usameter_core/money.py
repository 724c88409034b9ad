"""Money: an amount has a currency, and is rounded once, half away from zero."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Context, Decimal

# ISO 4217: currencies whose minor unit is not 1/100.
_MINOR_UNIT_DECIMALS = {
    **dict.fromkeys(
        [
            "BIF",
            "CLP",
            "DJF",
            "GNF",
            "ISK",
            "JPY",
            "KMF",
            "KRW",
            "PYG",
            "RWF",
            "UGX",
            "UYI",
            "VND",
            "VUV",
            "XAF",
            "XOF",
            "XPF",
        ],
        0,
    ),
    **dict.fromkeys(["BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"], 3),
    **dict.fromkeys(["CLF", "UYW"], 4),
}
# The one place where digits may be lost, so its context does not trap that.
_ROUNDING = Context(prec=60, rounding=ROUND_HALF_UP)


def minor_unit_decimals(currency: str) -> int:
    """Decimals of the currency's minor unit: JPY 0, USD 2, KWD 3 (ISO 4217)."""
    return _MINOR_UNIT_DECIMALS.get(currency, 2)


def round_amount(amount: Decimal, currency: str) -> Decimal:
    """The amount in whole minor units, half away from zero; an invoice line is rounded once, here."""
    return amount.quantize(Decimal(1).scaleb(-minor_unit_decimals(currency)), context=_ROUNDING)


def format_amount(amount: Decimal, currency: str) -> str:
    """A rounded amount with its currency's decimals: "2.00" USD, "2" JPY; zero has no sign."""
    return format(_ROUNDING.add(round_amount(amount, currency), Decimal(0)), "f")
