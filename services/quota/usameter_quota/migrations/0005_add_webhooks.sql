-- Where organizations are told of their quota events, and what became of the telling.
--
-- Each endpoint reads the log of quota events by a cursor of its own, so that what writes an event
-- knows nothing of webhooks and never waits for them.
--
-- Adds tables; old code does not know them.

SET LOCAL lock_timeout = '5s';

CREATE TABLE quota.webhook_endpoint (
    org_id                 uuid        NOT NULL,
    endpoint_id            uuid        NOT NULL,
    url                    text        NOT NULL,
    types                  text[]      NOT NULL,
    description            text        NOT NULL,
    secret                 bytea       NOT NULL,
    previous_secret        bytea,
    previous_secret_until  timestamptz,
    position               bigint      NOT NULL,
    created_at             timestamptz NOT NULL,
    disabled_at            timestamptz,
    CONSTRAINT webhook_endpoint_pkey PRIMARY KEY (org_id, endpoint_id),
    CONSTRAINT webhook_endpoint_secret_check CHECK (octet_length(secret) BETWEEN 24 AND 64),
    CONSTRAINT webhook_endpoint_previous_secret_check
        CHECK ((previous_secret IS NULL) = (previous_secret_until IS NULL))
);
COMMENT ON TABLE quota.webhook_endpoint IS 'Where to send quota events.';
COMMENT ON COLUMN quota.webhook_endpoint.types IS 'Of quota_event.type; empty: all.';
COMMENT ON COLUMN quota.webhook_endpoint.secret IS
    'In clear, since messages are signed with it: nobody but the role of the service may read this table.';
COMMENT ON COLUMN quota.webhook_endpoint.previous_secret IS 'Signs too, until previous_secret_until.';
COMMENT ON COLUMN quota.webhook_endpoint.position IS
    'Quota events up to here have their delivery, or were not wanted; at first, all that there were.';
COMMENT ON COLUMN quota.webhook_endpoint.disabled_at IS 'When it answered 410.';

CREATE TABLE quota.webhook_delivery (
    org_id         uuid        NOT NULL,
    endpoint_id    uuid        NOT NULL,
    position       bigint      NOT NULL,
    state          text        NOT NULL,
    attempt_count  smallint    NOT NULL,
    attempt_after  timestamptz,
    created_at     timestamptz NOT NULL,
    closed_at      timestamptz,
    CONSTRAINT webhook_delivery_pkey PRIMARY KEY (org_id, endpoint_id, position),
    CONSTRAINT webhook_delivery_endpoint_fkey FOREIGN KEY (org_id, endpoint_id)
        REFERENCES quota.webhook_endpoint (org_id, endpoint_id) ON DELETE CASCADE,
    CONSTRAINT webhook_delivery_quota_event_fkey FOREIGN KEY (org_id, position)
        REFERENCES quota.quota_event (org_id, position),
    CONSTRAINT webhook_delivery_state_check CHECK (state IN ('PENDING', 'DELIVERED', 'FAILED')),
    CONSTRAINT webhook_delivery_attempt_after_check CHECK ((state = 'PENDING') = (attempt_after IS NOT NULL)),
    CONSTRAINT webhook_delivery_closed_at_check CHECK ((state = 'PENDING') = (closed_at IS NULL))
);
COMMENT ON TABLE quota.webhook_delivery IS
    'Quota events to be sent to an endpoint, and those that were; closed ones stay for 30 days.';
COMMENT ON COLUMN quota.webhook_delivery.position IS 'Of the quota event; with the endpoint it is the id of the message.';
COMMENT ON COLUMN quota.webhook_delivery.attempt_count IS 'Attempts whose outcome is known.';
COMMENT ON COLUMN quota.webhook_delivery.attempt_after IS
    'Nobody attempts it before; whoever does moves it ahead first, as the lease of the attempt.';

CREATE INDEX webhook_delivery_due_idx ON quota.webhook_delivery (org_id, endpoint_id, attempt_after)
    WHERE state = 'PENDING';
CREATE INDEX webhook_delivery_closed_idx ON quota.webhook_delivery (closed_at) WHERE state <> 'PENDING';

CREATE TABLE quota.webhook_attempt (
    org_id        uuid        NOT NULL,
    endpoint_id   uuid        NOT NULL,
    position      bigint      NOT NULL,
    number        smallint    NOT NULL,
    attempted_at  timestamptz NOT NULL,
    duration_ms   integer     NOT NULL,
    status_code   smallint,
    error         text,
    CONSTRAINT webhook_attempt_pkey PRIMARY KEY (org_id, endpoint_id, position, number),
    CONSTRAINT webhook_attempt_delivery_fkey FOREIGN KEY (org_id, endpoint_id, position)
        REFERENCES quota.webhook_delivery (org_id, endpoint_id, position) ON DELETE CASCADE,
    CONSTRAINT webhook_attempt_answer_check CHECK ((status_code IS NULL) <> (error IS NULL))
);
COMMENT ON TABLE quota.webhook_attempt IS 'Attempts whose outcome is known; append-only, and gone with their delivery.';
COMMENT ON COLUMN quota.webhook_attempt.number IS '1, 2, … for each delivery.';
COMMENT ON COLUMN quota.webhook_attempt.status_code IS 'Of the answer in HTTP; null: none came.';
COMMENT ON COLUMN quota.webhook_attempt.error IS 'Why no answer came.';

GRANT SELECT, INSERT, UPDATE, DELETE ON quota.webhook_endpoint, quota.webhook_delivery TO usameter_quota;
GRANT SELECT, INSERT ON quota.webhook_attempt TO usameter_quota;
