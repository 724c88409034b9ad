"""The document of an invoice as a PDF."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE

import msgspec

from usameter_billing.documents.model import Document
from usameter_core.errors import Internal, Unavailable
from usameter_core.grpc.context import remaining_seconds

# Documents that are made at once; the others wait for their turn, or until their callers have given up.
_PROCESSES_MAX = 2
_TYPESETTING_SECONDS_MAX = 25.0


class PdfPrinter:
    """Prints documents: the same one has the same bytes, for nothing of the machine, the clock or chance is in them.

    Each in a process of its own. In this one typst's caches would grow to more than 1 GB (they keep the last
    documents, some 130 MB for 1,000 lines), and a document that takes too long could not be stopped.
    """

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(_PROCESSES_MAX)

    async def print(self, document: Document) -> bytes:
        """The PDF, A4.

        Raises:
            Unavailable: There was not enough time; a retry is safe.
        """
        text = msgspec.json.encode(document)
        try:
            async with asyncio.timeout(remaining_seconds(at_most=_TYPESETTING_SECONDS_MAX)), self._turns:
                return await _typeset(text)
        except TimeoutError:
            raise Unavailable("The PDF was not ready in time; try again", retry_safe=True) from None


async def _typeset(text: bytes) -> bytes:
    command = (sys.executable, "-m", "usameter_billing.documents.typeset")
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    try:
        pdf, problem = await process.communicate(text)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise Internal(f"typesetting failed: {problem.decode(errors='replace')[-2000:]}")
    return pdf
