"""What a finalized line counts as billed before it, read so that nothing that stands there ends an audit.

The column holds any JSON to PostgreSQL, and a cast of what is none of ours would fail the whole statement, and
with it the audit that is to name the line.
"""

from __future__ import annotations

_UUID = "'^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$'"
_AMOUNT = "'^-?[0-9]{1,40}([.][0-9]{1,20})?([eE][+-]?[0-9]{1,2})?$'"

# Whether it is a list of lines with invoice and amount; of a billing.invoice_line that is called `line`. CASE, since
# nothing else in SQL promises an order. A backslash stands in no id and no amount, and may escape what is no text.
IS_READABLE = f"""
    CASE WHEN json_typeof(line.previously_billed) <> 'array' THEN false
    WHEN strpos(line.previously_billed::text, '\\') > 0 THEN false
    ELSE NOT EXISTS (
        SELECT FROM json_array_elements(line.previously_billed) AS each
        WHERE (each->>'line_id' ~ {_UUID} AND each->>'invoice_id' ~ {_UUID} AND each->>'amount' ~ {_AMOUNT}) IS NOT TRUE
    ) END"""

# It, or no lines where it cannot be read: which `IS_READABLE` reports.
READABLE_LINES = f"CASE WHEN {IS_READABLE} THEN line.previously_billed ELSE '[]' END"
