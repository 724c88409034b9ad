-- Prices, the pulled part of the ledger, drafts, invoices and jobs.
-- Compatibility: the first migration; there is no older code. PostgreSQL 14 or newer.
--
-- Grants are design: a finalized invoice, its lines, a price version, a snapshot and a credit entry have
-- neither UPDATE nor DELETE, so no bug of the service can change what was billed. Of an invoice only the
-- columns can be updated that say what became of it. Drafts are separate tables for that reason, and not a
-- status. A cover is taken back by one function, and from void invoices only.
--
-- No foreign key from lines to invoices: one statement after the other in one transaction writes both, and
-- nothing deletes either. The check of a foreign key keeps the plan that it made while the table was empty,
-- a sequential scan; it took 0.2 of the 0.35 seconds of a batch of 200 invoices, and grew with each.

-- For the exclusion constraint of billing_period; a trusted extension, so the schema's owner may add it.
CREATE EXTENSION IF NOT EXISTS btree_gist WITH SCHEMA billing;

CREATE TABLE billing.price (
    org_id          uuid        NOT NULL,
    price_id        uuid        NOT NULL,
    event_type      text        COLLATE "C" NOT NULL,
    tenant_id       text        COLLATE "C" NOT NULL,
    effective_from  timestamptz NOT NULL,
    terms           jsonb       NOT NULL,
    created_at      timestamptz NOT NULL,
    CONSTRAINT price_pkey PRIMARY KEY (org_id, price_id),
    CONSTRAINT price_version_key UNIQUE (org_id, event_type, tenant_id, effective_from)
);
COMMENT ON COLUMN billing.price.tenant_id IS 'Empty: every tenant without a price of its own';
COMMENT ON COLUMN billing.price.terms IS 'The price of the REST contract; decimals are text in major currency units';

CREATE TABLE billing.billing_period (
    org_id        uuid        NOT NULL,
    tenant_id     text        COLLATE "C" NOT NULL,
    period_start  timestamptz NOT NULL,
    period_end    timestamptz NOT NULL,
    CONSTRAINT billing_period_pkey PRIMARY KEY (org_id, tenant_id, period_start),
    CONSTRAINT billing_period_order_check CHECK (period_start < period_end),
    CONSTRAINT billing_period_midnight_check CHECK (
        (period_start AT TIME ZONE 'UTC')::time = '00:00' AND (period_end AT TIME ZONE 'UTC')::time = '00:00'
    ),
    CONSTRAINT billing_period_overlap_excl EXCLUDE USING gist (
        org_id WITH =, tenant_id WITH =, tstzrange(period_start, period_end) WITH &&
    )
);
COMMENT ON COLUMN billing.billing_period.period_start IS 'Inclusive, a UTC midnight';
COMMENT ON COLUMN billing.billing_period.period_end IS 'Exclusive, a UTC midnight';

CREATE TABLE billing.ledger_cursor (
    org_id         uuid   NOT NULL,
    through_epoch  bigint NOT NULL,
    CONSTRAINT ledger_cursor_pkey PRIMARY KEY (org_id),
    CONSTRAINT ledger_cursor_through_epoch_check CHECK (through_epoch >= 0)
);
COMMENT ON COLUMN billing.ledger_cursor.through_epoch IS 'All snapshots of this epoch and of earlier ones are here';

CREATE TABLE billing.snapshot (
    org_id       uuid    NOT NULL,
    snapshot_id  uuid    NOT NULL,
    epoch        bigint  NOT NULL,
    tenant_id    text    COLLATE "C" NOT NULL,
    event_type   text    COLLATE "C" NOT NULL,
    day          date    NOT NULL,
    entry_count  bigint  NOT NULL,
    total        numeric NOT NULL,
    root         bytea   NOT NULL,
    CONSTRAINT snapshot_pkey PRIMARY KEY (org_id, snapshot_id),
    CONSTRAINT snapshot_root_check CHECK (octet_length(root) = 32)
);
CREATE INDEX snapshot_subject_idx ON billing.snapshot (org_id, tenant_id, event_type, day);
COMMENT ON COLUMN billing.snapshot.day IS 'UTC day on which the entries happened';
COMMENT ON COLUMN billing.snapshot.total IS 'Units; signed, since corrections are entries';

CREATE TABLE billing.pending_use (
    org_id        uuid        NOT NULL,
    tenant_id     text        COLLATE "C" NOT NULL,
    period_start  timestamptz NOT NULL,
    event_type    text        COLLATE "C" NOT NULL,
    epoch         bigint      NOT NULL,
    period_end    timestamptz NOT NULL,
    CONSTRAINT pending_use_pkey PRIMARY KEY (org_id, tenant_id, period_start, event_type, epoch)
);
COMMENT ON TABLE billing.pending_use IS
    'Where uncovered snapshots are: written with them, deleted by the invoice that covers them, so that nobody has to search the history. Use without a price stays.';

CREATE TABLE billing.tenant_account (
    org_id     uuid NOT NULL,
    tenant_id  text COLLATE "C" NOT NULL,
    CONSTRAINT tenant_account_pkey PRIMARY KEY (org_id, tenant_id)
);
COMMENT ON TABLE billing.tenant_account IS 'The row that whoever drafts or finalizes for a tenant locks first, in key order';

CREATE TABLE billing.draft (
    org_id                uuid        NOT NULL,
    invoice_id            uuid        NOT NULL,
    tenant_id             text        COLLATE "C" NOT NULL,
    period_start          timestamptz NOT NULL,
    period_end            timestamptz NOT NULL,
    currency              text        COLLATE "C" NOT NULL,
    through_epoch         bigint      NOT NULL,
    subtotal              numeric     NOT NULL,
    tax                   numeric     NOT NULL,
    total                 numeric     NOT NULL,
    unpriced_event_types  text[]      NOT NULL,
    CONSTRAINT draft_pkey PRIMARY KEY (org_id, invoice_id),
    CONSTRAINT draft_subject_key UNIQUE (org_id, tenant_id, period_start, currency),
    CONSTRAINT draft_currency_check CHECK (currency ~ '^[A-Z]{3}$'),
    CONSTRAINT draft_total_check CHECK (total = subtotal + tax)
);
CREATE INDEX draft_tenant_idx ON billing.draft (org_id, tenant_id, invoice_id);
COMMENT ON COLUMN billing.draft.total IS 'Major currency units';

CREATE TABLE billing.draft_line (
    org_id             uuid        NOT NULL,
    invoice_id         uuid        NOT NULL,
    position           integer     NOT NULL,
    line_id            uuid        NOT NULL,
    kind               text        NOT NULL,
    tenant_id          text        COLLATE "C" NOT NULL,
    period_start       timestamptz NOT NULL,
    period_end         timestamptz NOT NULL,
    event_type         text        COLLATE "C",
    price_id           uuid,
    quantity           numeric,
    subscription_id    uuid,
    plan_id            uuid,
    fee_seconds        bigint,
    tax_rate           numeric     NOT NULL,
    rated_amount       numeric     NOT NULL,
    amount             numeric     NOT NULL,
    previously_billed  json        NOT NULL,
    snapshot_ids       uuid[]      NOT NULL,
    CONSTRAINT draft_line_pkey PRIMARY KEY (org_id, invoice_id, position),
    CONSTRAINT draft_line_kind_check CHECK (
        kind = 'TRUE_UP' OR kind = 'USAGE' AND subscription_id IS NULL OR kind = 'BASE_FEE' AND event_type IS NULL
    ),
    CONSTRAINT draft_line_subject_check CHECK (
        num_nonnulls(event_type, price_id, quantity) = 3 AND num_nonnulls(subscription_id, plan_id, fee_seconds) = 0
        OR num_nonnulls(event_type, price_id, quantity) = 0 AND num_nonnulls(subscription_id, plan_id, fee_seconds) = 3
           AND snapshot_ids = '{}'
    )
);

CREATE TABLE billing.invoice_number (
    org_id       uuid   NOT NULL,
    last_number  bigint NOT NULL,
    CONSTRAINT invoice_number_pkey PRIMARY KEY (org_id)
);
COMMENT ON TABLE billing.invoice_number IS
    'Taken last in the finalizing transaction: rolled back with it, so numbers have no gap, and held no longer than its writes';

CREATE TABLE billing.invoice (
    org_id                uuid        NOT NULL,
    invoice_id            uuid        NOT NULL,
    number                bigint      NOT NULL,
    tenant_id             text        COLLATE "C" NOT NULL,
    status                text        NOT NULL,
    period_start          timestamptz NOT NULL,
    period_end            timestamptz NOT NULL,
    currency              text        COLLATE "C" NOT NULL,
    through_epoch         bigint      NOT NULL,
    subtotal              numeric     NOT NULL,
    tax                   numeric     NOT NULL,
    total                 numeric     NOT NULL,
    unpriced_event_types  text[]      NOT NULL,
    issued_at             timestamptz NOT NULL,
    due_at                timestamptz NOT NULL,
    seller_name           text        NOT NULL,
    bill_to_address       text        NOT NULL,
    amount_due            numeric     NOT NULL,
    amount_paid           numeric     NOT NULL DEFAULT 0,
    paid_at               timestamptz,
    payment_reference     text,
    voided_at             timestamptz,
    void_reason           text,
    uncollectible_at      timestamptz,
    uncollectible_reason  text,
    CONSTRAINT invoice_pkey PRIMARY KEY (org_id, invoice_id),
    CONSTRAINT invoice_number_key UNIQUE (org_id, number),
    CONSTRAINT invoice_currency_check CHECK (currency ~ '^[A-Z]{3}$'),
    CONSTRAINT invoice_status_check CHECK (status IN ('open', 'paid', 'void', 'uncollectible')),
    CONSTRAINT invoice_total_check CHECK (total = subtotal + tax),
    CONSTRAINT invoice_due_at_check CHECK (issued_at <= due_at),
    CONSTRAINT invoice_amounts_check CHECK (
        amount_due >= 0 AND amount_paid >= 0 AND amount_due + amount_paid <= greatest(total, 0)
    ),
    CONSTRAINT invoice_amount_due_check CHECK ((amount_due > 0) = (status IN ('open', 'uncollectible'))),
    CONSTRAINT invoice_amount_paid_check CHECK (amount_paid = 0 OR status = 'paid'),
    -- A credit, or what credit has covered, was paid from the start; void it keeps that moment.
    CONSTRAINT invoice_paid_check CHECK (
        CASE WHEN paid_at IS NULL THEN status <> 'paid' ELSE status IN ('paid', 'void') END
    ),
    CONSTRAINT invoice_payment_reference_check CHECK (payment_reference IS NULL OR amount_paid > 0),
    CONSTRAINT invoice_void_check CHECK (
        (status = 'void') = (voided_at IS NOT NULL) AND (voided_at IS NULL) = (void_reason IS NULL)
    ),
    CONSTRAINT invoice_uncollectible_check CHECK (
        (status <> 'uncollectible' OR uncollectible_at IS NOT NULL)
        AND (uncollectible_at IS NULL) = (uncollectible_reason IS NULL)
    )
);
CREATE INDEX invoice_tenant_idx ON billing.invoice (org_id, tenant_id, invoice_id);
COMMENT ON COLUMN billing.invoice.number IS 'From 1 without a gap within the organization';
COMMENT ON COLUMN billing.invoice.total IS 'Major currency units; negative: a credit';
COMMENT ON COLUMN billing.invoice.seller_name IS 'Of the organization, when the invoice was finalized';
COMMENT ON COLUMN billing.invoice.bill_to_address IS
    'Of the tenant''s settings, when the invoice was finalized; empty: there was none';
COMMENT ON COLUMN billing.invoice.amount_due IS
    'Still to be paid: total less the credit that it drew, what was credited on it and what was paid, not below 0';

CREATE TABLE billing.invoice_line (
    org_id             uuid        NOT NULL,
    invoice_id         uuid        NOT NULL,
    position           integer     NOT NULL,
    line_id            uuid        NOT NULL,
    kind               text        NOT NULL,
    tenant_id          text        COLLATE "C" NOT NULL,
    period_start       timestamptz NOT NULL,
    period_end         timestamptz NOT NULL,
    event_type         text        COLLATE "C",
    price_id           uuid,
    quantity           numeric,
    subscription_id    uuid,
    plan_id            uuid,
    fee_seconds        bigint,
    tax_rate           numeric     NOT NULL,
    rated_amount       numeric     NOT NULL,
    amount             numeric     NOT NULL,
    previously_billed  json        NOT NULL,
    snapshot_ids       uuid[]      NOT NULL,
    CONSTRAINT invoice_line_pkey PRIMARY KEY (org_id, invoice_id, position),
    CONSTRAINT invoice_line_kind_check CHECK (
        kind = 'TRUE_UP' OR kind = 'USAGE' AND subscription_id IS NULL OR kind = 'BASE_FEE' AND event_type IS NULL
    ),
    CONSTRAINT invoice_line_subject_check CHECK (
        num_nonnulls(event_type, price_id, quantity) = 3 AND num_nonnulls(subscription_id, plan_id, fee_seconds) = 0
        OR num_nonnulls(event_type, price_id, quantity) = 0 AND num_nonnulls(subscription_id, plan_id, fee_seconds) = 3
           AND snapshot_ids = '{}'
    )
);
-- What was billed of a tenant's period; which periods of an event type are pinned, over all tenants; a tenant's fees.
CREATE INDEX invoice_line_period_idx ON billing.invoice_line (org_id, tenant_id, period_start);
CREATE INDEX invoice_line_event_type_idx ON billing.invoice_line (org_id, event_type, period_start);
CREATE INDEX invoice_line_fee_idx ON billing.invoice_line (org_id, tenant_id) WHERE subscription_id IS NOT NULL;
COMMENT ON TABLE billing.invoice_line IS 'Of the use of an event type, or of a base fee: then without event type, price and quantity';
COMMENT ON COLUMN billing.invoice_line.period_start IS 'Of the billing period of the use, or of the interval of the base fee';
COMMENT ON COLUMN billing.invoice_line.quantity IS 'Units of the whole period, not only of the covered snapshots';
COMMENT ON COLUMN billing.invoice_line.fee_seconds IS 'Those of the interval that the plan is charged for';
COMMENT ON COLUMN billing.invoice_line.tax_rate IS 'Percent';
COMMENT ON COLUMN billing.invoice_line.rated_amount IS 'Major currency units, rounded once';
COMMENT ON COLUMN billing.invoice_line.amount IS 'rated_amount less what was billed for the same subject and period before';

CREATE TABLE billing.snapshot_cover (
    org_id       uuid NOT NULL,
    snapshot_id  uuid NOT NULL,
    invoice_id   uuid NOT NULL,
    CONSTRAINT snapshot_cover_pkey PRIMARY KEY (org_id, snapshot_id)
);
COMMENT ON TABLE billing.snapshot_cover IS 'The one invoice that is not void and covers the snapshot (invariant I5)';

CREATE FUNCTION billing.uncover_snapshots(of_org_id uuid, void_invoice_id uuid) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = '' AS $$
    DELETE FROM billing.snapshot_cover
    WHERE org_id = of_org_id AND invoice_id = void_invoice_id AND EXISTS (
        SELECT FROM billing.invoice
        WHERE org_id = of_org_id AND invoice_id = void_invoice_id AND status = 'void'
    )
$$;
COMMENT ON FUNCTION billing.uncover_snapshots IS
    'The only way in which a cover ends; runs as the owner, since the service has no DELETE';

CREATE TABLE billing.credit_entry (
    org_id          uuid        NOT NULL,
    tenant_id       text        COLLATE "C" NOT NULL,
    currency        text        COLLATE "C" NOT NULL,
    entry_id        uuid        NOT NULL,
    kind            text        NOT NULL,
    amount          numeric     NOT NULL,
    invoice_id      uuid        NOT NULL,
    credit_note_id  uuid,
    created_at      timestamptz NOT NULL,
    CONSTRAINT credit_entry_pkey PRIMARY KEY (org_id, tenant_id, currency, entry_id),
    CONSTRAINT credit_entry_kind_check CHECK (
        (kind IN ('GRANTED', 'RETURNED') AND amount > 0) OR (kind IN ('DRAWN', 'REVOKED') AND amount < 0)
    ),
    CONSTRAINT credit_entry_credit_note_check CHECK (credit_note_id IS NULL OR kind = 'GRANTED')
);
CREATE UNIQUE INDEX credit_entry_source_key
    ON billing.credit_entry (org_id, (coalesce(credit_note_id, invoice_id)), kind);
COMMENT ON COLUMN billing.credit_entry.amount IS 'Major currency units; the balance is the sum, and never below 0';
COMMENT ON COLUMN billing.credit_entry.credit_note_id IS 'The credit note of the invoice that granted it; null: the invoice did';

CREATE TABLE billing.mark_outbox (
    org_id         uuid        NOT NULL,
    invoice_id     uuid        NOT NULL,
    version        bigint      GENERATED ALWAYS AS IDENTITY,
    billed_at      timestamptz,
    attempt_after  timestamptz NOT NULL,
    CONSTRAINT mark_outbox_pkey PRIMARY KEY (org_id, invoice_id)
);
CREATE INDEX mark_outbox_attempt_idx ON billing.mark_outbox (attempt_after);
COMMENT ON TABLE billing.mark_outbox IS 'Invoices whose snapshots ingest has still to be told of; a row is deleted once it was';
COMMENT ON COLUMN billing.mark_outbox.billed_at IS 'Null: the invoice is void, and its snapshots are not billed';
COMMENT ON COLUMN billing.mark_outbox.version IS 'Of the marks; ascending, so that an older one never replaces a newer';

CREATE TABLE billing.job (
    org_id        uuid        NOT NULL,
    job_id        uuid        NOT NULL,
    period_start  timestamptz NOT NULL,
    period_end    timestamptz NOT NULL,
    finalize      boolean     NOT NULL,
    state         text        NOT NULL,
    done          bigint      NOT NULL,
    total         bigint,
    problems      text[]      NOT NULL,
    after_tenant  text        COLLATE "C" NOT NULL,
    failures      integer     NOT NULL,
    lease_id      uuid,
    lease_until   timestamptz NOT NULL,
    created_at    timestamptz NOT NULL,
    CONSTRAINT job_pkey PRIMARY KEY (org_id, job_id),
    CONSTRAINT job_state_check CHECK (state IN ('running', 'succeeded', 'failed'))
);
CREATE INDEX job_running_idx ON billing.job (lease_until) WHERE state = 'running';
COMMENT ON COLUMN billing.job.total IS 'Tenants; null until they were counted';
COMMENT ON COLUMN billing.job.after_tenant IS 'The last tenant that is done; advances in the transaction that bills it';
COMMENT ON COLUMN billing.job.failures IS 'Attempts in a row that failed as a whole';
COMMENT ON COLUMN billing.job.lease_until IS 'Until then the worker with lease_id owns it';

-- Drafts and finalized invoices as one list; the service filters by org_id first, always.
CREATE VIEW billing.any_invoice AS
SELECT org_id, invoice_id, NULL::bigint AS number, tenant_id, 'draft'::text AS status, period_start, period_end, currency,
       through_epoch, subtotal, tax, total, unpriced_event_types,
       NULL::timestamptz AS issued_at, NULL::timestamptz AS due_at,
       NULL::text AS seller_name, NULL::text AS bill_to_address,
       greatest(total, 0) AS amount_due, 0::numeric AS amount_paid,
       NULL::timestamptz AS paid_at, NULL::text AS payment_reference, NULL::timestamptz AS voided_at,
       NULL::text AS void_reason, NULL::timestamptz AS uncollectible_at, NULL::text AS uncollectible_reason
FROM billing.draft
UNION ALL
SELECT org_id, invoice_id, number, tenant_id, status, period_start, period_end, currency,
       through_epoch, subtotal, tax, total, unpriced_event_types, issued_at, due_at, seller_name, bill_to_address,
       amount_due, amount_paid, paid_at, payment_reference, voided_at, void_reason, uncollectible_at, uncollectible_reason
FROM billing.invoice;

CREATE VIEW billing.any_line AS
SELECT org_id, invoice_id, position, line_id, kind, period_start, period_end, event_type, price_id, quantity,
       subscription_id, plan_id, fee_seconds, tax_rate, rated_amount, amount, previously_billed, snapshot_ids
FROM billing.draft_line
UNION ALL
SELECT org_id, invoice_id, position, line_id, kind, period_start, period_end, event_type, price_id, quantity,
       subscription_id, plan_id, fee_seconds, tax_rate, rated_amount, amount, previously_billed, snapshot_ids
FROM billing.invoice_line;

GRANT SELECT, INSERT ON
    billing.price, billing.billing_period, billing.snapshot, billing.invoice, billing.invoice_line,
    billing.snapshot_cover, billing.credit_entry
TO usameter_billing;
GRANT UPDATE (
    status, amount_due, amount_paid, paid_at, payment_reference, voided_at, void_reason, uncollectible_at,
    uncollectible_reason
) ON billing.invoice TO usameter_billing;
REVOKE ALL ON FUNCTION billing.uncover_snapshots FROM PUBLIC;
GRANT EXECUTE ON FUNCTION billing.uncover_snapshots TO usameter_billing;
-- UPDATE is what SELECT … FOR UPDATE asks for; there is nothing in the row to change.
GRANT SELECT, INSERT, UPDATE ON billing.tenant_account, billing.ledger_cursor, billing.invoice_number, billing.job
TO usameter_billing;
GRANT SELECT, INSERT, DELETE ON billing.pending_use TO usameter_billing;
GRANT SELECT, INSERT, UPDATE, DELETE ON billing.draft, billing.draft_line, billing.mark_outbox TO usameter_billing;
GRANT SELECT ON billing.any_invoice, billing.any_line TO usameter_billing;
