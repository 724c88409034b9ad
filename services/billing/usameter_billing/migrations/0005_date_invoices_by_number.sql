-- A later number has no earlier date of issue.
-- Compatibility: adds a column; older code leaves it as it is, and dates its invoices by its own clock as before.

ALTER TABLE billing.invoice_number ADD COLUMN last_issued_at timestamptz;
COMMENT ON COLUMN billing.invoice_number.last_issued_at IS
    'When the invoice with the last number was issued; replicas'' clocks differ, and whoever waits for a number has looked at its own before. Null: nobody has noted it yet';
