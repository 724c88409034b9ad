"""Numbers as they were written: a double is taken only where it says the same."""

from __future__ import annotations

import math
import re
import sys

from usameter_gateway.violations import Refused

SIGNIFICANT_DIGITS_MAX = 15


class NumberLiteral(str):
    """A JSON number with a fraction or exponent that a double does not carry as it is written."""

    __slots__ = ()

    def nearest_double(self) -> float:
        """The double nearest to it.

        Raises:
            Refused: It is beyond the range of doubles.
        """
        number = float(self)
        if math.isinf(number):
            raise Refused.because("beyond the range of a double")
        return number


def float_from_literal(literal: str) -> float | NumberLiteral:
    """The double a literal names, or the literal where that would be rounded.

    "Rounded" means: the shortest decimal form of the double is another number than the literal.
    Up to 15 significant digits survive every normal double; with more that depends on luck.
    """
    # 16 characters hold the point or the exponent and at most 15 digits.
    if len(literal) > 16 or "e" in literal or "E" in literal:
        mantissa = re.split("[eE]", literal)[0]
        digits = mantissa.lstrip("-").replace(".", "").strip("0")
        if len(digits) > SIGNIFICANT_DIGITS_MAX:
            return NumberLiteral(literal)
        number = float(literal)
        # Subnormal doubles have fewer digits, and below them is only zero.
        if math.isinf(number) or (digits and abs(number) < sys.float_info.min):
            return NumberLiteral(literal)
        return number
    return float(literal)
