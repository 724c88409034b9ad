-- Limits, what counts against them, what is reserved, and what was reached.
--
-- Counters hold entries + unconsumed reservations in ONE number (invariant I4), so that settling a
-- reservation as committed, which is what happens to nearly all of them, touches no counter.
-- Whoever changes a limit or a counter holds its head's row lock; see quota.lock_heads.
--
-- First migration: nothing to be compatible with.

CREATE TABLE quota.quota_head (
    org_id      uuid NOT NULL,
    tenant_id   text NOT NULL,
    event_type  text NOT NULL,
    CONSTRAINT quota_head_pkey PRIMARY KEY (org_id, tenant_id, event_type)
);
COMMENT ON TABLE quota.quota_head IS
    'What is locked before a limit or a counter of an (organization, tenant, event type) changes. Never deleted.';

CREATE TABLE quota.quota_limit (
    org_id              uuid        NOT NULL,
    tenant_id           text        NOT NULL,
    event_type          text        NOT NULL,
    version             bigint      NOT NULL,
    limit_value         numeric     NOT NULL,
    enforcement_mode    text        NOT NULL,
    period              text        NOT NULL,
    soft_limit_percent  smallint    NOT NULL,
    grace_period_hours  smallint,
    set_at              timestamptz NOT NULL,
    CONSTRAINT quota_limit_pkey PRIMARY KEY (org_id, tenant_id, event_type),
    CONSTRAINT quota_limit_head_fkey FOREIGN KEY (org_id, tenant_id, event_type)
        REFERENCES quota.quota_head (org_id, tenant_id, event_type),
    CONSTRAINT quota_limit_version_check CHECK (version > 0),
    CONSTRAINT quota_limit_limit_value_check CHECK (limit_value >= 0),
    CONSTRAINT quota_limit_enforcement_mode_check CHECK (enforcement_mode IN ('HARD', 'SOFT', 'DISABLED')),
    CONSTRAINT quota_limit_period_check CHECK (period IN ('HOURLY', 'DAILY', 'MONTHLY', 'ROLLING_30D')),
    CONSTRAINT quota_limit_soft_limit_percent_check CHECK (soft_limit_percent BETWEEN 1 AND 100),
    CONSTRAINT quota_limit_grace_period_hours_check
        CHECK (grace_period_hours IS NULL OR (grace_period_hours > 0 AND enforcement_mode = 'SOFT'))
);
COMMENT ON TABLE quota.quota_limit IS 'The limits that are in force now; see quota.limit_of for which one is whose.';
COMMENT ON COLUMN quota.quota_limit.tenant_id IS
    'Empty: the organization''s default, of every tenant without a limit of its own for the event type.';
COMMENT ON COLUMN quota.quota_limit.version IS 'Of the limit_change that set it.';
COMMENT ON COLUMN quota.quota_limit.limit_value IS 'Units of the event type a period.';
COMMENT ON COLUMN quota.quota_limit.soft_limit_percent IS 'Warnings start above this share of the limit, in percent.';
COMMENT ON COLUMN quota.quota_limit.grace_period_hours IS
    'How long more than the limit is let through, from when stored use exceeds it; null: always.';
COMMENT ON COLUMN quota.quota_limit.set_at IS 'The limit binds the periods that end after this moment.';

CREATE TABLE quota.limit_change (
    org_id              uuid        NOT NULL,
    tenant_id           text        NOT NULL,
    event_type          text        NOT NULL,
    version             bigint      NOT NULL,
    changed_at          timestamptz NOT NULL,
    changed_by          text        NOT NULL,
    limit_value         numeric,
    enforcement_mode    text,
    period              text,
    soft_limit_percent  smallint,
    grace_period_hours  smallint,
    current             numeric     NOT NULL,
    CONSTRAINT limit_change_pkey PRIMARY KEY (org_id, tenant_id, event_type, version),
    CONSTRAINT limit_change_set_or_deleted_check
        CHECK (num_nulls(limit_value, enforcement_mode, period, soft_limit_percent) IN (0, 4))
);
COMMENT ON TABLE quota.limit_change IS
    'Every change of a limit, for ever: without it nobody can tell what an admission was measured against.';
COMMENT ON COLUMN quota.limit_change.version IS '1, 2, … for each head, deletions included.';
COMMENT ON COLUMN quota.limit_change.changed_by IS 'Id of the API key that asked for it.';
COMMENT ON COLUMN quota.limit_change.limit_value IS 'Units a period; null: the limit was deleted.';
COMMENT ON COLUMN quota.limit_change.current IS
    'Counter of the current period at that moment, in units; of a deleted limit''s period where it was deleted. '
    '0 for a default.';

CREATE TABLE quota.limit_state (
    org_id         uuid        NOT NULL,
    tenant_id      text        NOT NULL,
    event_type     text        NOT NULL,
    period_key     timestamptz NOT NULL,
    period_end     timestamptz NOT NULL,
    limit_reached  boolean     NOT NULL,
    grace_ends_at  timestamptz,
    CONSTRAINT limit_state_pkey PRIMARY KEY (org_id, tenant_id, event_type, period_key),
    CONSTRAINT limit_state_grace_ends_at_check CHECK (grace_ends_at IS NULL OR limit_reached)
);
COMMENT ON TABLE quota.limit_state IS
    'What stored use has reached of the limit in force, in a period: a row from the warning line on, until the period '
    'has ended or the limit is changed.';
COMMENT ON COLUMN quota.limit_state.period_key IS 'Start of the period; -infinity: the rolling window, which has no other.';
COMMENT ON COLUMN quota.limit_state.period_end IS 'When a worker looks at it: the period has ended, the window has moved.';
COMMENT ON COLUMN quota.limit_state.grace_ends_at IS
    'Set once stored use has exceeded a SOFT limit with a grace period; from then on nothing more is let through.';

CREATE INDEX limit_state_period_end_idx ON quota.limit_state (period_end);

CREATE TABLE quota.quota_event (
    org_id              uuid        NOT NULL,
    position            bigint      NOT NULL,
    type                text        NOT NULL,
    tenant_id           text        NOT NULL,
    event_type          text        NOT NULL,
    occurred_at         timestamptz NOT NULL,
    limit_value         numeric     NOT NULL,
    enforcement_mode    text        NOT NULL,
    period              text        NOT NULL,
    soft_limit_percent  smallint    NOT NULL,
    period_start        timestamptz NOT NULL,
    period_end          timestamptz NOT NULL,
    stored              numeric     NOT NULL,
    grace_ends_at       timestamptz,
    CONSTRAINT quota_event_pkey PRIMARY KEY (org_id, position),
    CONSTRAINT quota_event_type_check
        CHECK (type IN ('SOFT_LIMIT_REACHED', 'LIMIT_REACHED', 'GRACE_STARTED', 'RESET')),
    CONSTRAINT quota_event_grace_ends_at_check CHECK ((type = 'GRACE_STARTED') = (grace_ends_at IS NOT NULL))
);
COMMENT ON TABLE quota.quota_event IS
    'What happened to quotas, append-only; written by quota.append_events in the transaction in which it happened.';
COMMENT ON COLUMN quota.quota_event.position IS
    '1, 2, … for each organization, without gap, visible in this order: whoever has read up to a position misses none '
    'below it.';
COMMENT ON COLUMN quota.quota_event.period_start IS 'Of the period in which stored use was counted.';
COMMENT ON COLUMN quota.quota_event.period_end IS 'Of that period; of the rolling window the UTC midnight at which it moves.';
COMMENT ON COLUMN quota.quota_event.stored IS 'Units stored in the period: without open reservations.';
COMMENT ON COLUMN quota.quota_event.grace_ends_at IS 'Of GRACE_STARTED: when the grace ends, unless the period ends before.';

CREATE INDEX quota_event_tenant_idx ON quota.quota_event (org_id, tenant_id, position);

-- Every reservation rewrites its counters. Half-empty pages keep the new version on the old one's
-- page (HOT), so that no index is touched.
CREATE TABLE quota.usage_hour (
    org_id      uuid        NOT NULL,
    tenant_id   text        NOT NULL,
    event_type  text        NOT NULL,
    hour        timestamptz NOT NULL,
    quantity    numeric     NOT NULL,
    CONSTRAINT usage_hour_pkey PRIMARY KEY (org_id, tenant_id, event_type, hour),
    CONSTRAINT usage_hour_quantity_check CHECK (quantity >= 0)
) WITH (fillfactor = 50);
COMMENT ON TABLE quota.usage_hour IS 'Use by the hour of the events'' own timestamps.';
COMMENT ON COLUMN quota.usage_hour.hour IS 'Start of the UTC hour.';
COMMENT ON COLUMN quota.usage_hour.quantity IS 'Entries + unconsumed reservations, in units.';

CREATE TABLE quota.usage_day (
    org_id      uuid    NOT NULL,
    tenant_id   text    NOT NULL,
    event_type  text    NOT NULL,
    day         date    NOT NULL,
    quantity    numeric NOT NULL,
    CONSTRAINT usage_day_pkey PRIMARY KEY (org_id, tenant_id, event_type, day),
    CONSTRAINT usage_day_quantity_check CHECK (quantity >= 0)
) WITH (fillfactor = 50);
COMMENT ON TABLE quota.usage_day IS 'The sums of usage_hour by UTC day: a month is at most 31 rows to read, not 744.';
COMMENT ON COLUMN quota.usage_day.day IS 'UTC day.';
COMMENT ON COLUMN quota.usage_day.quantity IS 'Entries + unconsumed reservations, in units.';

CREATE TABLE quota.reservation (
    org_id          uuid          NOT NULL,
    reservation_id  uuid          NOT NULL,
    state           text          NOT NULL,
    created_at      timestamptz   NOT NULL,
    closed_at       timestamptz,
    watched         boolean       NOT NULL DEFAULT false,
    request_count   integer       NOT NULL,
    findings        jsonb,
    tenant_ids      text[]        NOT NULL,
    event_types     text[]        NOT NULL,
    hours           timestamptz[] NOT NULL,
    quantities      numeric[]     NOT NULL,
    claims          uuid[],
    public_id       text,
    held_quantity   numeric,
    expires_at      timestamptz,
    claimed_by      uuid,
    CONSTRAINT reservation_pkey PRIMARY KEY (org_id, reservation_id),
    CONSTRAINT reservation_state_check CHECK (
        state = 'OPEN'
        OR (public_id IS NULL AND state IN ('COMMITTED', 'ABORTED'))
        OR (public_id IS NOT NULL AND state IN ('CONSUMED', 'CANCELLED', 'EXPIRED'))
    ),
    CONSTRAINT reservation_hold_check
        CHECK (public_id IS NOT NULL OR num_nonnulls(held_quantity, expires_at, claimed_by) = 0),
    CONSTRAINT reservation_closed_at_check CHECK ((state = 'OPEN') = (closed_at IS NULL)),
    CONSTRAINT reservation_items_check CHECK (
        cardinality(tenant_ids) = cardinality(event_types)
        AND cardinality(tenant_ids) = cardinality(hours)
        AND cardinality(tenant_ids) = cardinality(quantities)
    )
) WITH (fillfactor = 80);
COMMENT ON TABLE quota.reservation IS
    'What a group of requests took, until what became of it is known; or a hold, which a customer made and an event '
    'consumes. Closed ones stay for a day, to meet what comes late.';
COMMENT ON COLUMN quota.reservation.reservation_id IS 'Made by the caller; of a hold by quota, from public_id.';
COMMENT ON COLUMN quota.reservation.watched IS
    'Committing it may take stored use to a line of a limit; see quota.watch_reservations.';
COMMENT ON COLUMN quota.reservation.request_count IS 'Requests in the group; 0: settled before any reserve arrived.';
COMMENT ON COLUMN quota.reservation.findings IS
    'What quota.decide said, to be said again to a repeat; null: all admitted, nothing to warn of.';
COMMENT ON COLUMN quota.reservation.quantities IS
    'Taken by the admitted requests, in units, by (tenant, event type, hour): four arrays of one length. A hold has one '
    'element, or none where it was cancelled before it was made; while it is claimed, what the claim leaves of it.';
COMMENT ON COLUMN quota.reservation.claims IS 'Holds that committing it consumes, distinct; null: none.';
COMMENT ON COLUMN quota.reservation.public_id IS 'Id of a hold, as the customer knows it; null: no hold.';
COMMENT ON COLUMN quota.reservation.held_quantity IS
    'What the hold is for, in units; null: it was cancelled before it was made.';
COMMENT ON COLUMN quota.reservation.expires_at IS 'When a worker gives the hold back, unless it is claimed then.';
COMMENT ON COLUMN quota.reservation.claimed_by IS
    'The reservation that consumes the hold, once that is committed; null: none. A hold changes under its head''s '
    'lock only.';

CREATE INDEX reservation_open_idx ON quota.reservation (created_at) WHERE state = 'OPEN' AND public_id IS NULL;
CREATE INDEX reservation_expires_at_idx ON quota.reservation (expires_at)
    WHERE state = 'OPEN' AND public_id IS NOT NULL AND claimed_by IS NULL;
CREATE INDEX reservation_open_of_org_idx ON quota.reservation (org_id) WHERE state = 'OPEN';
CREATE INDEX reservation_closed_idx ON quota.reservation (closed_at) WHERE state <> 'OPEN';

CREATE TABLE quota.adjustment (
    org_id         uuid        NOT NULL,
    adjustment_id  uuid        NOT NULL,
    tenant_id      text        NOT NULL,
    event_type     text        NOT NULL,
    hour           timestamptz NOT NULL,
    quantity       numeric     NOT NULL,
    adjusted_at    timestamptz NOT NULL,
    CONSTRAINT adjustment_pkey PRIMARY KEY (org_id, adjustment_id)
);
COMMENT ON TABLE quota.adjustment IS 'Corrections that were counted; append-only, so that none is counted twice.';
COMMENT ON COLUMN quota.adjustment.adjustment_id IS 'The corrected event''s id.';
COMMENT ON COLUMN quota.adjustment.quantity IS 'Signed units, added to the counters of the hour and its day.';

-- FOR UPDATE needs the UPDATE privilege; nothing ever updates a head.
GRANT SELECT, INSERT, UPDATE ON quota.quota_head TO usameter_quota;
GRANT SELECT, INSERT, UPDATE, DELETE ON quota.quota_limit TO usameter_quota;
GRANT SELECT, INSERT ON quota.limit_change TO usameter_quota;
GRANT SELECT, INSERT, UPDATE, DELETE ON quota.limit_state TO usameter_quota;
GRANT SELECT, INSERT ON quota.quota_event TO usameter_quota;
GRANT SELECT, INSERT, UPDATE ON quota.usage_hour TO usameter_quota;
GRANT SELECT, INSERT, UPDATE ON quota.usage_day TO usameter_quota;
GRANT SELECT, INSERT, UPDATE, DELETE ON quota.reservation TO usameter_quota;
GRANT SELECT, INSERT ON quota.adjustment TO usameter_quota;
