"""Whether an invoice is what the entries behind it make it: every check there is, without any I/O.

`documents` are what is checked, `chain` the ledger, `amounts` the arithmetic, `leaves` the entries. A single
event's own proof is checked by `event_proofs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from usameter_proof.amounts import check_amounts
from usameter_proof.chain import NotedHead, check_ledger
from usameter_proof.documents import Entry, InvoiceProof
from usameter_proof.findings import Finding
from usameter_proof.leaves import EntryCheck


def verify_invoice(
    proof: InvoiceProof, entries: Iterable[Entry], *, noted: NotedHead | None = None
) -> Iterator[Finding]:
    """All that is wrong; nothing where the invoice is proven.

    Args:
        proof: The whole document.
        entries: Those behind it, in the order in which the API lists them; read once, one at a time.
        noted: A head of the chain that was noted earlier; then the document's chain must contain it.

    Raises:
        UnusableDocument: The document lacks what is needed to compare.
    """
    yield from check_ledger(proof, noted=noted)
    yield from check_amounts(proof)
    check = EntryCheck(proof)
    for entry in entries:
        yield from check.add(entry)
    yield from check.finish()
