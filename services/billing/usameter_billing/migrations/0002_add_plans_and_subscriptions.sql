-- Plans, the subscriptions of tenants to them, and how each tenant is billed.
-- Compatibility: older code reads prices without plan_id and would take a plan's price for the organization's
-- default; nothing that is released does.
--
-- A plan and its prices have neither UPDATE nor DELETE, like any price: what was billed by them stays readable. A
-- period row gets DELETE, since a subscription cuts anew what was not invoiced.

CREATE TABLE billing.plan (
    org_id      uuid        NOT NULL,
    plan_id     uuid        NOT NULL,
    name        text        COLLATE "C" NOT NULL,
    base_fee    numeric     NOT NULL,
    currency    text        COLLATE "C" NOT NULL,
    interval    text        NOT NULL,
    created_at  timestamptz NOT NULL,
    CONSTRAINT plan_pkey PRIMARY KEY (org_id, plan_id),
    CONSTRAINT plan_name_key UNIQUE (org_id, name),
    CONSTRAINT plan_base_fee_check CHECK (base_fee >= 0),
    CONSTRAINT plan_currency_check CHECK (currency ~ '^[A-Z]{3}$'),
    CONSTRAINT plan_interval_check CHECK (interval IN ('MONTHLY', 'YEARLY'))
);
COMMENT ON COLUMN billing.plan.base_fee IS 'For an interval, in major currency units';

-- The price of an event type on a plan is a price version like others, so that lines name and pin it alike.
ALTER TABLE billing.price ADD COLUMN plan_id uuid;
ALTER TABLE billing.price DROP CONSTRAINT price_version_key;
ALTER TABLE billing.price ADD CONSTRAINT price_plan_check CHECK (plan_id IS NULL OR tenant_id = '');
CREATE UNIQUE INDEX price_version_key ON billing.price (org_id, event_type, tenant_id, effective_from)
    WHERE plan_id IS NULL;
CREATE UNIQUE INDEX price_plan_key ON billing.price (org_id, plan_id, event_type) WHERE plan_id IS NOT NULL;
COMMENT ON COLUMN billing.price.plan_id IS 'Null: not of a plan';

CREATE TABLE billing.subscription (
    org_id           uuid        NOT NULL,
    subscription_id  uuid        NOT NULL,
    tenant_id        text        COLLATE "C" NOT NULL,
    start_at         timestamptz NOT NULL,
    end_at           timestamptz,
    created_at       timestamptz NOT NULL,
    CONSTRAINT subscription_pkey PRIMARY KEY (org_id, subscription_id),
    CONSTRAINT subscription_order_check CHECK (start_at <= end_at),
    CONSTRAINT subscription_midnight_check CHECK (
        (start_at AT TIME ZONE 'UTC')::time = '00:00' AND (end_at AT TIME ZONE 'UTC')::time = '00:00'
    ),
    CONSTRAINT subscription_overlap_excl EXCLUDE USING gist (
        org_id WITH =, tenant_id WITH =, tstzrange(start_at, end_at) WITH &&
    )
);
CREATE INDEX subscription_tenant_idx ON billing.subscription (org_id, tenant_id, start_at);
COMMENT ON COLUMN billing.subscription.start_at IS 'Inclusive, a UTC midnight; months and years are counted from it';
COMMENT ON COLUMN billing.subscription.end_at IS 'Exclusive, a UTC midnight; null: until it is cancelled; start_at: never began';

CREATE TABLE billing.subscription_phase (
    org_id           uuid        NOT NULL,
    subscription_id  uuid        NOT NULL,
    start_at         timestamptz NOT NULL,
    plan_id          uuid        NOT NULL,
    CONSTRAINT subscription_phase_pkey PRIMARY KEY (org_id, subscription_id, start_at),
    CONSTRAINT subscription_phase_midnight_check CHECK ((start_at AT TIME ZONE 'UTC')::time = '00:00')
);
COMMENT ON TABLE billing.subscription_phase IS 'A plan from start_at until the next phase or the end of the subscription';

CREATE TABLE billing.tenant_settings (
    org_id     uuid    NOT NULL,
    tenant_id  text    COLLATE "C" NOT NULL,
    currency   text    COLLATE "C",
    tax_rate   numeric NOT NULL,
    due_days   integer,
    address    text    NOT NULL,
    CONSTRAINT tenant_settings_pkey PRIMARY KEY (org_id, tenant_id),
    CONSTRAINT tenant_settings_currency_check CHECK (currency ~ '^[A-Z]{3}$'),
    CONSTRAINT tenant_settings_tax_rate_check CHECK (tax_rate BETWEEN 0 AND 100),
    CONSTRAINT tenant_settings_due_days_check CHECK (due_days >= 0)
);
COMMENT ON COLUMN billing.tenant_settings.currency IS 'Null: any';
COMMENT ON COLUMN billing.tenant_settings.tax_rate IS 'Percent';
COMMENT ON COLUMN billing.tenant_settings.due_days IS 'Null: the default of the deployment';

GRANT SELECT, INSERT ON billing.plan TO usameter_billing;
GRANT SELECT, INSERT, UPDATE ON billing.subscription, billing.tenant_settings TO usameter_billing;
GRANT SELECT, INSERT, DELETE ON billing.subscription_phase TO usameter_billing;
GRANT DELETE ON billing.billing_period TO usameter_billing;
