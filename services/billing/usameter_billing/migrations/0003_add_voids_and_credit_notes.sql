-- Credit notes: what is taken off finalized invoices afterwards.
-- Compatibility: adds tables only.
--
-- Neither UPDATE nor DELETE, like the invoices that they belong to.

CREATE TABLE billing.credit_note_number (
    org_id       uuid   NOT NULL,
    last_number  bigint NOT NULL,
    CONSTRAINT credit_note_number_pkey PRIMARY KEY (org_id)
);
COMMENT ON TABLE billing.credit_note_number IS 'As invoice_number, for credit notes';

CREATE TABLE billing.credit_note (
    org_id              uuid        NOT NULL,
    credit_note_id      uuid        NOT NULL,
    number              bigint      NOT NULL,
    invoice_id          uuid        NOT NULL,
    tenant_id           text        COLLATE "C" NOT NULL,
    currency            text        COLLATE "C" NOT NULL,
    subtotal            numeric     NOT NULL,
    tax                 numeric     NOT NULL,
    total               numeric     NOT NULL,
    amount_due_reduced  numeric     NOT NULL,
    credit_granted      numeric     NOT NULL,
    reason              text        NOT NULL,
    issued_at           timestamptz NOT NULL,
    CONSTRAINT credit_note_pkey PRIMARY KEY (org_id, credit_note_id),
    CONSTRAINT credit_note_number_key UNIQUE (org_id, number),
    CONSTRAINT credit_note_total_check CHECK (total > 0 AND total = subtotal + tax),
    CONSTRAINT credit_note_use_check CHECK (
        amount_due_reduced >= 0 AND credit_granted >= 0 AND amount_due_reduced + credit_granted = total
    )
);
CREATE INDEX credit_note_invoice_idx ON billing.credit_note (org_id, invoice_id);
COMMENT ON COLUMN billing.credit_note.credit_note_id IS 'Of the idempotency key where one was given, else random';
COMMENT ON COLUMN billing.credit_note.number IS 'From 1 without a gap within the organization';
COMMENT ON COLUMN billing.credit_note.total IS 'Major currency units; what is taken off';
COMMENT ON COLUMN billing.credit_note.credit_granted IS 'What was more than the invoice had due; in credit_entry as well';

CREATE TABLE billing.credit_note_line (
    org_id          uuid     NOT NULL,
    credit_note_id  uuid     NOT NULL,
    position        smallint NOT NULL,
    line_id         uuid     NOT NULL,
    amount          numeric  NOT NULL,
    tax_rate        numeric  NOT NULL,
    CONSTRAINT credit_note_line_pkey PRIMARY KEY (org_id, credit_note_id, position),
    CONSTRAINT credit_note_line_line_key UNIQUE (org_id, credit_note_id, line_id),
    CONSTRAINT credit_note_line_amount_check CHECK (amount > 0)
);
COMMENT ON TABLE billing.credit_note_line IS 'Which lines of the invoice are credited; a credit note by amount has none';
COMMENT ON COLUMN billing.credit_note_line.amount IS 'Net, in major currency units';
COMMENT ON COLUMN billing.credit_note_line.tax_rate IS 'Percent; that of the line';

GRANT SELECT, INSERT ON billing.credit_note, billing.credit_note_line TO usameter_billing;
GRANT SELECT, INSERT, UPDATE ON billing.credit_note_number TO usameter_billing;
