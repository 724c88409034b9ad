"""The audit of the invoices: whatever is changed of snapshots, lines, prices and numbers is named (I5 to I7)."""

from __future__ import annotations

import pytest

from tests.support.billing import Organization, World
from tests.support.invoice_audit import (
    COPY,
    LINE,
    OF_AMOUNT,
    OF_COPY,
    OF_COUNT,
    OF_COVER,
    OF_LOST,
    OF_NO_PRICE,
    OF_QUANTITY,
    OF_RATED,
    OF_STRANGE,
    OF_SUBTOTAL,
    OF_UNREADABLE,
    OF_USE,
    USE,
    audit,
    billed,
    subscribed,
    told,
)
from usameter.billing.v1 import price_pb2
from usameter_core.ids import parse_id


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        pytest.param(
            "UPDATE billing.snapshot SET total = 91 WHERE total = 90",
            [("I5", OF_COPY, COPY), ("I6", OF_USE, USE), *[("I6", OF_QUANTITY, LINE)] * 2],
            id="a snapshot's total",
        ),
        pytest.param(
            "UPDATE billing.snapshot SET root = sha256('x') WHERE total = 90",
            [("I5", OF_COPY, COPY)],
            id="a snapshot's root",
        ),
        pytest.param(
            "DELETE FROM billing.snapshot WHERE total = 1 AND tenant_id = 'bolt'",
            [("I5", OF_COPY, COPY)],
            id="a removed snapshot that is not billed",
        ),
        pytest.param(
            """INSERT INTO billing.snapshot SELECT org_id, gen_random_uuid(), epoch, tenant_id, 'other', day, 1, 5, root
               FROM billing.snapshot WHERE total = 90""",
            [
                ("I5", "snapshots are here that the ledger does not have", {"epoch"}),
                ("I6", OF_LOST, COPY),
            ],
            id="a snapshot too many",
        ),
        pytest.param(
            "UPDATE billing.ledger_cursor SET through_epoch = 9",
            [("I5", "epochs were pulled that the ledger does not have", set())],
            id="epochs from the future",
        ),
        pytest.param(
            """DELETE FROM billing.snapshot_cover
               WHERE snapshot_id = (SELECT snapshot_id FROM billing.snapshot WHERE total = 90)""",
            [("I5", OF_COVER, {"snapshot_id", "invoice_id"}), ("I6", OF_LOST, COPY)],
            id="a removed cover",
        ),
        pytest.param(
            """UPDATE billing.snapshot_cover SET invoice_id = (SELECT invoice_id FROM billing.invoice WHERE number = 2)
               WHERE snapshot_id = (SELECT snapshot_id FROM billing.snapshot WHERE total = 90)""",
            [("I5", OF_COVER, {"snapshot_id", "invoice_id"})] * 2,
            id="a cover of another invoice",
        ),
        pytest.param(
            """UPDATE billing.invoice_line SET snapshot_ids = snapshot_ids || (
                   SELECT snapshot_id FROM billing.snapshot WHERE total = 90)
               WHERE invoice_id = (SELECT invoice_id FROM billing.invoice WHERE number = 3)""",
            [("I5", OF_COVER, {"snapshot_id", "invoice_id"})],
            id="a snapshot counted by two invoices",
        ),
        pytest.param(
            "DELETE FROM billing.pending_use WHERE tenant_id = 'bolt'", [("I6", OF_LOST, COPY)], id="use lost"
        ),
        pytest.param(
            "UPDATE billing.invoice_line SET amount = amount + 0.01 WHERE event_type = 'mb'",
            [
                ("I6", OF_USE, USE),
                ("I7", OF_AMOUNT, {"invoice_id", "line_id"}),
                ("I7", OF_SUBTOTAL, {"invoice_id"}),
            ],
            id="a line's amount",
        ),
        pytest.param(
            """UPDATE billing.invoice_line SET quantity = quantity + 1
               WHERE event_type = 'mb'""",
            [("I6", OF_QUANTITY, LINE), ("I7", OF_RATED, LINE)],
            id="a line's quantity",
        ),
        pytest.param(
            "UPDATE billing.invoice_line SET kind = 'TRUE_UP' WHERE event_type = 'mb'",
            [("I7", "a line's kind is not that of its subject", LINE)],
            id="a line's kind",
        ),
        pytest.param(
            "UPDATE billing.invoice_line SET tenant_id = 'bolt' WHERE event_type = 'mb'",
            [
                ("I5", OF_STRANGE, {*LINE, "snapshot_id"}),
                ("I6", OF_QUANTITY, LINE),
                ("I6", OF_USE, USE),
                ("I7", "a line is of another tenant than its invoice", LINE),
            ],
            id="a line's tenant",
        ),
        pytest.param(
            """UPDATE billing.invoice_line SET event_type = 'other' WHERE event_type = 'mb'""",
            [
                ("I5", OF_STRANGE, {*LINE, "snapshot_id"}),
                ("I6", OF_QUANTITY, LINE),
                ("I6", OF_USE, USE),
                ("I7", "a line's price is of another use", LINE),
            ],
            id="a line's event type",
        ),
        pytest.param(
            """UPDATE billing.invoice_line SET previously_billed = '[]', rated_amount = amount
               WHERE kind = 'TRUE_UP'""",
            [
                ("I6", OF_COUNT, LINE),
                ("I7", "a line's kind is not that of its subject", LINE),
                ("I7", OF_RATED, LINE),
            ],
            id="what a line counts as billed",
        ),
        pytest.param(
            """UPDATE billing.invoice_line SET previously_billed =
                   ('[{"invoice_id": "' || invoice_id || '", "line_id": "' || line_id || '", "amount": "0"}]')::json
               WHERE event_type = 'mb'""",
            [("I6", OF_COUNT, LINE), ("I7", "a line's kind is not that of its subject", LINE)],
            id="a line that counts what was not billed before it",
        ),
        pytest.param(
            """UPDATE billing.price SET terms = jsonb_set(terms, '{unit_amount}', '"0.334"') WHERE event_type = 'mb'""",
            [("I6", OF_USE, USE), ("I7", OF_RATED, {"invoice_id", "line_id"})],
            id="a price",
        ),
        pytest.param(
            """UPDATE billing.price SET terms = jsonb_set(terms, '{unit_amount}', '"-0.333"')
               WHERE event_type = 'mb'""",
            [("I7", OF_NO_PRICE, {"invoice_id", "line_id"})],
            id="a price that is none",
        ),
        pytest.param(
            "UPDATE billing.price SET terms = '{}' WHERE event_type = 'mb'",
            [("I7", OF_NO_PRICE, {"invoice_id", "line_id"})],
            id="a price that is nothing at all",
        ),
        pytest.param(
            "DELETE FROM billing.price WHERE event_type = 'mb'",
            [("I7", "a line's price or plan is missing", {"invoice_id", "line_id"})],
            id="a removed price",
        ),
        pytest.param(
            "UPDATE billing.invoice SET tax = 1, total = total + 1, amount_due = amount_due + 1 WHERE number = 1",
            [("I7", "an invoice's tax is not that of its lines", {"invoice_id"})],
            id="tax",
        ),
        pytest.param(
            "UPDATE billing.invoice SET number = 9 WHERE number = 4",
            [("I7", "a number is missing", set()), ("I7", "a number was not counted", set())],
            id="a number",
        ),
        pytest.param(
            "UPDATE billing.invoice_number SET last_number = 6",
            [("I7", "a number is missing", set())],
            id="the last number",
        ),
        pytest.param(
            """DELETE FROM billing.invoice_line
               WHERE invoice_id = (SELECT invoice_id FROM billing.invoice WHERE number = 3)""",
            [
                ("I5", OF_COVER, {"snapshot_id", "invoice_id"}),
                ("I6", OF_USE, USE),
                ("I7", OF_SUBTOTAL, {"invoice_id"}),
            ],
            id="a removed line",
        ),
    ],
)
async def test_what_is_tampered_with_is_named_and_nothing_else(
    org: Organization, world: World, statement: str, expected: list[tuple[str, str, set[str]]]
) -> None:
    await billed(org)
    await world.admin.execute(statement)
    found = await audit(org)
    assert told(found) == sorted(expected)
    assert all(each.expected != each.found for each in found)


ID = "00000000-0000-0000-0000-000000000001"


@pytest.mark.parametrize(
    "stored",
    [
        "null",
        "{}",
        "7",
        '"[]"',
        "[1]",
        "[[]]",
        "[null]",
        "[{}]",
        f'[{{"invoice_id": "{ID}", "line_id": "{ID}"}}]',
        f'[{{"invoice_id": "{ID}", "line_id": "{ID}", "amount": null}}]',
        f'[{{"invoice_id": "{ID}", "line_id": "{ID}", "amount": "many"}}]',
        f'[{{"invoice_id": "{ID}", "line_id": "{ID}", "amount": "NaN"}}]',
        f'[{{"invoice_id": "{ID}", "line_id": "{ID}", "amount": "1e999999"}}]',
        f'[{{"invoice_id": "{ID}", "line_id": "{ID}", "amount": {{"a": 1}}}}]',
        f'[{{"invoice_id": "inv_1", "line_id": "{ID}", "amount": "1"}}]',
        f'[{{"invoice_id": "{ID}", "line_id": 1, "amount": "1"}}]',
        f'[{{"invoice_id": "{ID}", "line_id": "{ID}", "amount": "\\u0000"}}]',
        f'[{{"invoice_id": "{ID}", "line_id": "\\ud800", "amount": "1"}}]',
    ],
)
async def test_what_a_line_counts_and_cannot_be_read_is_named_and_the_audit_goes_on(
    org: Organization, world: World, stored: str
) -> None:
    """I6, I7: of a use and of a fee; and what is wrong beside it is named as well."""
    await subscribed(org)
    await billed(org)
    await world.admin.execute(
        "UPDATE billing.invoice_line SET previously_billed = $1 WHERE event_type = 'mb' OR plan_id IS NOT NULL", stored
    )
    lines = await world.admin.fetchval(
        "SELECT count(*) FROM billing.invoice_line WHERE event_type = 'mb' OR plan_id IS NOT NULL"
    )
    assert lines >= 3
    assert told(await audit(org)) == [("I7", OF_UNREADABLE, LINE)] * lines
    await world.admin.execute("UPDATE billing.invoice_line SET amount = amount + 1 WHERE event_type = 'mb'")
    found = told(await audit(org))
    assert [each for each in found if each[1] != OF_UNREADABLE] == [
        ("I6", OF_USE, USE),
        ("I7", OF_SUBTOTAL, {"invoice_id"}),
    ]


async def test_what_a_true_up_counts_and_cannot_be_read_is_missed_as_well(org: Organization, world: World) -> None:
    await billed(org)
    await world.admin.execute("UPDATE billing.invoice_line SET previously_billed = '{}' WHERE kind = 'TRUE_UP'")
    assert told(await audit(org)) == [("I6", OF_COUNT, LINE), ("I7", OF_UNREADABLE, LINE)]


FREE_AT_FIRST = price_pb2.Price(
    model=price_pb2.graduated,
    currency="USD",
    tiers=[price_pb2.PriceTier(up_to="1000", unit_amount="0"), price_pb2.PriceTier(unit_amount="0.02")],
)


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        ("quantity = 900", {OF_QUANTITY}),
        ("snapshot_ids = '{}'", {OF_COVER}),
        ("snapshot_ids = ARRAY[gen_random_uuid()]", {OF_COVER, OF_STRANGE}),
    ],
)
async def test_a_line_is_compared_with_its_use_also_where_no_amount_moves(
    org: Organization, world: World, change: str, problems: set[str]
) -> None:
    await org.set_terms("req", FREE_AT_FIRST)
    org.seal(("acme", "req", "2026-01-03", "90"))
    await org.bill("acme")
    assert await audit(org) == []
    await world.admin.execute(f"UPDATE billing.invoice_line SET {change}")
    assert {each.problem for each in await audit(org)} == problems


async def test_the_quantity_of_a_void_line_is_compared(org: Organization, world: World) -> None:
    await org.set_price("req", "0")
    org.seal(("acme", "req", "2026-01-03", "90"))
    voided = await org.bill("acme")
    await org.void(voided.id)
    org.seal(("acme", "req", "2026-01-04", "-4"))
    await org.bill("acme")
    assert await audit(org) == []
    await world.admin.execute("UPDATE billing.invoice_line SET quantity = 86")
    (found,) = await audit(org)
    assert (found.problem, found.expected, found.found) == (OF_QUANTITY, "90", "86")
    assert found.place.invoice_id == voided.id


async def test_the_amounts_and_the_place_of_a_violation_are_exact(org: Organization, world: World) -> None:
    january, *_ = await billed(org)
    (line,) = [line for line in january.lines if line.event_type == "mb"]
    await world.admin.execute(
        "UPDATE billing.invoice_line SET amount = 3 WHERE line_id = $1", parse_id("lin", line.id, field="id")
    )
    use, amount, subtotal = sorted(await audit(org), key=lambda each: (each.invariant, each.problem))
    assert (use.expected, use.found) == ("2.33", "3")
    assert (use.place.tenant_id, use.place.event_type, use.place.period_start) == ("acme", "mb", "2026-01-01")
    assert (amount.expected, amount.found, amount.place.line_id) == ("2.33", "3", line.id)
    assert (subtotal.expected, subtotal.found, subtotal.place.invoice_id) == ("12", "11.33", january.id)
