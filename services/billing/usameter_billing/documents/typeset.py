"""The process that makes one PDF: a Document of model.py as JSON on standard input, the PDF on standard output.

Imports nothing of ours, so that it starts in some 50 ms.
"""

from __future__ import annotations

import sys
from pathlib import Path

import typst


def main() -> None:
    """Typeset, or fail with typst's own words on standard error."""
    compiler = typst.Compiler(
        Path(__file__).with_name("invoice.typ").read_bytes(),
        # What the machine has installed must not show.
        font_paths=typst.Fonts(include_system_fonts=False),
        sys_inputs={"document": sys.stdin.buffer.read().decode()},
    )
    pdf = compiler.compile(format="pdf")
    assert isinstance(pdf, bytes)
    sys.stdout.buffer.write(pdf)


if __name__ == "__main__":
    main()
