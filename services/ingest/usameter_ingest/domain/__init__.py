"""Values and rules of the ledger: no I/O, no clock."""
