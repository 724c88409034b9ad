-- The ledger of an organization: entries (events and corrections), their rollups, the epochs they
-- are written into, the snapshots of sealed epochs, and what became of quota reservations.
--
-- Entries, snapshots and outcomes are facts: the service's role may insert and read them, and
-- neither change nor (but for outcomes that were settled long ago) delete them.
-- Text keys are COLLATE "C": their order is that of their bytes, here and in the Merkle trees.

CREATE TABLE ingest.epoch (
    org_id          uuid        NOT NULL,
    epoch           bigint      NOT NULL,
    state           text        NOT NULL DEFAULT 'OPEN',
    opened_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    closed_at       timestamptz,
    seal_job_id     uuid,
    sealed_at       timestamptz,
    entry_count     bigint,
    snapshot_count  integer,
    snapshots_root  bytea,
    previous_root   bytea,
    root            bytea,
    CONSTRAINT epoch_pkey PRIMARY KEY (org_id, epoch),
    CONSTRAINT epoch_number_positive CHECK (epoch >= 1),
    CONSTRAINT epoch_state_known CHECK (state IN ('OPEN', 'CLOSED', 'SEALED')),
    CONSTRAINT epoch_closed_has_time CHECK ((state = 'OPEN') = (closed_at IS NULL)),
    CONSTRAINT epoch_sealed_is_whole CHECK (
        (state = 'SEALED') = (num_nulls(sealed_at, entry_count, snapshot_count, snapshots_root, previous_root, root) = 0)),
    CONSTRAINT epoch_root_length CHECK (
        octet_length(root) = 32 AND octet_length(previous_root) = 32 AND octet_length(snapshots_root) = 32)
);
COMMENT ON TABLE ingest.epoch IS 'Pages of an organization''s ledger: one OPEN, some CLOSED (being sealed), all others SEALED.';
COMMENT ON COLUMN ingest.epoch.snapshots_root IS 'Root of the Merkle tree over the epoch''s snapshots: with previous_root, all that root is made of.';
COMMENT ON COLUMN ingest.epoch.root IS 'Head of the chain up to this epoch, 32 bytes; see docs/ledger-format.md.';
CREATE UNIQUE INDEX epoch_one_open ON ingest.epoch (org_id) WHERE state = 'OPEN';
CREATE INDEX epoch_unsealed ON ingest.epoch (org_id, epoch) WHERE state = 'CLOSED';
CREATE INDEX epoch_seal_job ON ingest.epoch (seal_job_id) WHERE seal_job_id IS NOT NULL;

CREATE TABLE ingest.usage_event (
    org_id           uuid           NOT NULL,
    event_id         uuid           NOT NULL,
    tenant_id        text COLLATE "C" NOT NULL,
    event_type       text COLLATE "C" NOT NULL,
    quantity         numeric(20, 6) NOT NULL,
    occurred_at      timestamptz    NOT NULL,
    timestamp_given  boolean        NOT NULL,
    ingested_at      timestamptz    NOT NULL,
    epoch            bigint         NOT NULL,
    metadata         json           NOT NULL,
    idempotency_key  text,
    request_hash     bytea          NOT NULL,
    leaf_hash        bytea          NOT NULL,
    CONSTRAINT usage_event_pkey PRIMARY KEY (org_id, event_id),
    CONSTRAINT usage_event_quantity_range CHECK (quantity > 0 AND quantity < 100000000000000),
    CONSTRAINT usage_event_hash_length CHECK (octet_length(request_hash) = 32 AND octet_length(leaf_hash) = 32)
);
COMMENT ON TABLE ingest.usage_event IS 'Events, append-only. The primary key is the deduplication: with an idempotency key the id is derived from it.';
COMMENT ON COLUMN ingest.usage_event.occurred_at IS 'The event''s own timestamp, by which it is counted and billed.';
COMMENT ON COLUMN ingest.usage_event.timestamp_given IS 'False where the caller gave no timestamp and occurred_at is our clock.';
COMMENT ON COLUMN ingest.usage_event.ingested_at IS 'clock_timestamp() of the transaction that wrote it, after it had the ledger''s lock.';
COMMENT ON COLUMN ingest.usage_event.metadata IS 'Exactly the bytes that request_hash covers.';
COMMENT ON COLUMN ingest.usage_event.request_hash IS 'Tells a duplicate from a conflict; SHA-256, see docs/ledger-format.md.';
COMMENT ON COLUMN ingest.usage_event.leaf_hash IS 'The event''s leaf in its snapshot''s Merkle tree; SHA-256, see docs/ledger-format.md.';
-- By access path: one tenant's list; an organization's list; the entries of one epoch, for sealing.
CREATE INDEX usage_event_tenant_time ON ingest.usage_event (org_id, tenant_id, occurred_at, event_id);
CREATE INDEX usage_event_time ON ingest.usage_event (org_id, occurred_at, event_id);
CREATE INDEX usage_event_epoch ON ingest.usage_event (org_id, epoch);

CREATE TABLE ingest.correction (
    org_id          uuid           NOT NULL,
    event_id        uuid           NOT NULL,
    kind            text           NOT NULL,
    quantity_delta  numeric(20, 6) NOT NULL,
    reason          text           NOT NULL,
    tenant_id       text COLLATE "C" NOT NULL,
    event_type      text COLLATE "C" NOT NULL,
    occurred_at     timestamptz    NOT NULL,
    ingested_at     timestamptz    NOT NULL,
    epoch           bigint         NOT NULL,
    leaf_hash       bytea          NOT NULL,
    CONSTRAINT correction_pkey PRIMARY KEY (org_id, event_id),
    CONSTRAINT correction_event_fkey FOREIGN KEY (org_id, event_id) REFERENCES ingest.usage_event (org_id, event_id),
    CONSTRAINT correction_kind_known CHECK (kind IN ('VOID', 'AMEND')),
    CONSTRAINT correction_changes_something CHECK (quantity_delta <> 0),
    CONSTRAINT correction_hash_length CHECK (octet_length(leaf_hash) = 32)
);
COMMENT ON TABLE ingest.correction IS 'Signed entries beside events, at most one for each, append-only; tenant, type and occurred_at are the event''s.';
COMMENT ON COLUMN ingest.correction.epoch IS 'The epoch open when the correction was made, not the event''s.';
CREATE INDEX correction_epoch ON ingest.correction (org_id, epoch);
CREATE INDEX correction_time ON ingest.correction (org_id, occurred_at);

-- The rollups: sums of the entries, added to in the transaction that writes them (invariant I2). Whole days of
-- usage and all snapshots are read from days, the broken days at the ends of a span from hours. No index holds
-- what is added to, and pages have room: so an addition touches no index (HOT).
CREATE TABLE ingest.usage_day (
    org_id            uuid           NOT NULL,
    tenant_id         text COLLATE "C" NOT NULL,
    event_type        text COLLATE "C" NOT NULL,
    day               date           NOT NULL,
    epoch             bigint         NOT NULL,
    slot              smallint       NOT NULL,
    event_count       bigint         NOT NULL,
    correction_count  bigint         NOT NULL,
    quantity          numeric(30, 6) NOT NULL,
    CONSTRAINT usage_day_pkey PRIMARY KEY (org_id, tenant_id, event_type, day, epoch, slot),
    CONSTRAINT usage_day_counts CHECK (event_count >= 0 AND correction_count >= 0)
) WITH (fillfactor = 70);
COMMENT ON TABLE ingest.usage_day IS 'Sums of the entries by UTC day and by epoch.';
COMMENT ON COLUMN ingest.usage_day.slot IS 'Writers with different slots do not wait for each other''s row locks; readers sum over slots.';
-- By access path: the use of a whole organization; the totals of one epoch, for sealing. (One tenant''s use: the key.)
CREATE INDEX usage_day_day ON ingest.usage_day (org_id, day);
CREATE INDEX usage_day_epoch ON ingest.usage_day (org_id, epoch);

CREATE TABLE ingest.usage_hour (
    org_id       uuid           NOT NULL,
    tenant_id    text COLLATE "C" NOT NULL,
    event_type   text COLLATE "C" NOT NULL,
    hour         timestamptz    NOT NULL,
    slot         smallint       NOT NULL,
    event_count  bigint         NOT NULL,
    quantity     numeric(30, 6) NOT NULL,
    CONSTRAINT usage_hour_pkey PRIMARY KEY (org_id, tenant_id, event_type, hour, slot),
    CONSTRAINT usage_hour_count CHECK (event_count >= 0)
) WITH (fillfactor = 70);
COMMENT ON TABLE ingest.usage_hour IS 'Sums of the entries by UTC hour.';
COMMENT ON COLUMN ingest.usage_hour.event_count IS 'Events; corrections change only the quantity.';
COMMENT ON COLUMN ingest.usage_hour.slot IS 'As in usage_day.';
CREATE INDEX usage_hour_hour ON ingest.usage_hour (org_id, hour);

CREATE TABLE ingest.snapshot (
    org_id       uuid           NOT NULL,
    snapshot_id  uuid           NOT NULL,
    epoch        bigint         NOT NULL,
    tenant_id    text COLLATE "C" NOT NULL,
    event_type   text COLLATE "C" NOT NULL,
    day          date           NOT NULL,
    entry_count  bigint         NOT NULL,
    quantity     numeric(30, 6) NOT NULL,
    root         bytea          NOT NULL,
    position     integer        NOT NULL,
    leaf_hash    bytea          NOT NULL,
    CONSTRAINT snapshot_pkey PRIMARY KEY (org_id, snapshot_id),
    CONSTRAINT snapshot_key UNIQUE (org_id, epoch, tenant_id, event_type, day),
    CONSTRAINT snapshot_epoch_fkey FOREIGN KEY (org_id, epoch) REFERENCES ingest.epoch (org_id, epoch),
    CONSTRAINT snapshot_not_empty CHECK (entry_count > 0),
    CONSTRAINT snapshot_position_natural CHECK (position >= 0),
    CONSTRAINT snapshot_hash_length CHECK (octet_length(root) = 32 AND octet_length(leaf_hash) = 32)
);
COMMENT ON TABLE ingest.snapshot IS 'Entries of one tenant and event type on one UTC day within one sealed epoch; append-only.';
COMMENT ON COLUMN ingest.snapshot.position IS 'Place in the epoch''s Merkle tree, from 0: the order of (tenant_id, event_type, day).';
COMMENT ON COLUMN ingest.snapshot.leaf_hash IS 'The leaf at that place; SHA-256, see docs/ledger-format.md.';

CREATE TABLE ingest.snapshot_mark (
    org_id       uuid        NOT NULL,
    snapshot_id  uuid        NOT NULL,
    invoice_id   text,
    billed_at    timestamptz,
    version      bigint      NOT NULL,
    CONSTRAINT snapshot_mark_pkey PRIMARY KEY (org_id, snapshot_id),
    CONSTRAINT snapshot_mark_snapshot_fkey FOREIGN KEY (org_id, snapshot_id) REFERENCES ingest.snapshot (org_id, snapshot_id)
);
COMMENT ON TABLE ingest.snapshot_mark IS 'The finalized invoice that covers a snapshot, as billing last said; the greatest version stands.';

CREATE TABLE ingest.reservation_outcome (
    org_id          uuid        NOT NULL,
    reservation_id  uuid        NOT NULL,
    outcome         text        NOT NULL,
    recorded_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT reservation_outcome_pkey PRIMARY KEY (org_id, reservation_id),
    CONSTRAINT reservation_outcome_known CHECK (outcome IN ('COMMITTED', 'ABORTED'))
);
COMMENT ON TABLE ingest.reservation_outcome IS 'What became of a reservation: whoever inserts first decides, the other rolls back.';
CREATE INDEX reservation_outcome_time ON ingest.reservation_outcome (recorded_at);

CREATE TABLE ingest.quota_outbox (
    org_id       uuid           NOT NULL,
    event_id     uuid           NOT NULL,
    tenant_id    text           NOT NULL,
    event_type   text           NOT NULL,
    occurred_at  timestamptz    NOT NULL,
    quantity     numeric(20, 6) NOT NULL,
    created_at   timestamptz    NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT quota_outbox_pkey PRIMARY KEY (org_id, event_id),
    CONSTRAINT quota_outbox_gives_back CHECK (quantity < 0)
);
COMMENT ON TABLE ingest.quota_outbox IS 'Quantities that corrections give back to quota; deleted once quota has them.';

-- The lock that entries take shared and closing an epoch takes exclusively, per organization.
CREATE FUNCTION ingest.ledger_lock_key(p_org_id uuid) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT hashtextextended(p_org_id::text, 1)
$$;

-- Takes the ledger's lock shared and returns the epoch that is open under it. The lock comes in a
-- statement of its own: a statement's snapshot is older than a lock it waits for, so one that
-- locked and read would stamp entries with an epoch that was closed while it waited.
CREATE FUNCTION ingest.enter_open_epoch(p_org_id uuid) RETURNS bigint
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_epoch bigint;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'entries are written at READ COMMITTED' USING ERRCODE = 'UM000';
    END IF;
    PERFORM pg_advisory_xact_lock_shared(ingest.ledger_lock_key(p_org_id));
    LOOP
        SELECT epoch INTO v_epoch FROM ingest.epoch WHERE org_id = p_org_id AND state = 'OPEN';
        EXIT WHEN FOUND;
        INSERT INTO ingest.epoch (org_id, epoch) VALUES (p_org_id, 1) ON CONFLICT DO NOTHING;
    END LOOP;
    RETURN v_epoch;
END
$$;

-- What every leaf of one transaction ends with: epoch and ingested_at in microseconds.
CREATE FUNCTION ingest.leaf_suffix(p_epoch bigint, p_ingested_at timestamptz) RETURNS bytea
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT int8send(p_epoch) || int8send((extract(epoch FROM p_ingested_at) * 1000000)::bigint)
$$;

-- Writes a group of new events, their rollups and their reservation's outcome; all or nothing.
-- Arrays are parallel, sorted by event id (equal keys in opposite order would deadlock). Quantities come
-- as text: encoding a numeric costs the caller more than casting one costs here.
-- UM001: an event is there already. UM002: the reservation was given away.
CREATE FUNCTION ingest.record_events(
    p_org_id uuid, p_reservation_id uuid, p_slot smallint,
    p_event_ids uuid[], p_tenant_ids text[], p_event_types text[], p_quantities text[],
    p_occurred_ats timestamptz[], p_timestamps_given boolean[], p_metadatas json[], p_idempotency_keys text[],
    p_request_hashes bytea[], p_leaf_prefixes bytea[]
) RETURNS void
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_epoch       bigint := ingest.enter_open_epoch(p_org_id);
    v_ingested_at timestamptz := clock_timestamp();
    v_leaf_suffix bytea := ingest.leaf_suffix(v_epoch, v_ingested_at);
    v_inserted    bigint;
BEGIN
    INSERT INTO ingest.reservation_outcome (org_id, reservation_id, outcome)
    VALUES (p_org_id, p_reservation_id, 'COMMITTED')
    ON CONFLICT ON CONSTRAINT reservation_outcome_pkey DO NOTHING;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the reservation was given away' USING ERRCODE = 'UM002';
    END IF;

    INSERT INTO ingest.usage_event (
        org_id, event_id, tenant_id, event_type, quantity, occurred_at, timestamp_given, ingested_at,
        epoch, metadata, idempotency_key, request_hash, leaf_hash)
    SELECT p_org_id, e.event_id, e.tenant_id, e.event_type, e.quantity::numeric, e.occurred_at, e.timestamp_given, v_ingested_at,
           v_epoch, e.metadata, e.idempotency_key, e.request_hash, sha256('\x00'::bytea || e.leaf_prefix || v_leaf_suffix)
    FROM unnest(p_event_ids, p_tenant_ids, p_event_types, p_quantities, p_occurred_ats, p_timestamps_given,
                p_metadatas, p_idempotency_keys, p_request_hashes, p_leaf_prefixes)
         AS e(event_id, tenant_id, event_type, quantity, occurred_at, timestamp_given,
              metadata, idempotency_key, request_hash, leaf_prefix)
    ON CONFLICT ON CONSTRAINT usage_event_pkey DO NOTHING;
    GET DIAGNOSTICS v_inserted = ROW_COUNT;
    IF v_inserted <> cardinality(p_event_ids) THEN
        RAISE EXCEPTION 'an event is there already' USING ERRCODE = 'UM001';
    END IF;

    -- Grouped once for both, which costs as much as adding to some hundred rows. Each is written in the order of its key,
    -- and days before hours (PostgreSQL runs the main part of a statement first): opposite orders would deadlock.
    WITH part AS MATERIALIZED (
        SELECT e.tenant_id COLLATE "C" AS tenant_id, e.event_type COLLATE "C" AS event_type,
               date_trunc('hour', e.occurred_at, 'UTC') AS hour, count(*) AS event_count, sum(e.quantity::numeric) AS quantity
        FROM unnest(p_tenant_ids, p_event_types, p_quantities, p_occurred_ats)
             AS e(tenant_id, event_type, quantity, occurred_at)
        GROUP BY 1, 2, 3
        ORDER BY 1, 2, 3
    ), hours AS (
        INSERT INTO ingest.usage_hour AS rollup (org_id, tenant_id, event_type, hour, slot, event_count, quantity)
        SELECT p_org_id, tenant_id, event_type, hour, p_slot, event_count, quantity FROM part
        ON CONFLICT ON CONSTRAINT usage_hour_pkey DO UPDATE
        SET event_count = rollup.event_count + EXCLUDED.event_count,
            quantity = rollup.quantity + EXCLUDED.quantity
    )
    INSERT INTO ingest.usage_day AS rollup (
        org_id, tenant_id, event_type, day, epoch, slot, event_count, correction_count, quantity)
    SELECT p_org_id, tenant_id, event_type, (hour AT TIME ZONE 'UTC')::date AS day, v_epoch, p_slot,
           sum(event_count), 0, sum(quantity)
    FROM part
    GROUP BY tenant_id, event_type, day
    ORDER BY tenant_id, event_type, day
    ON CONFLICT ON CONSTRAINT usage_day_pkey DO UPDATE
    SET event_count = rollup.event_count + EXCLUDED.event_count,
        quantity = rollup.quantity + EXCLUDED.quantity;
END
$$;

-- Writes the correction of an event, its rollups, and what quota must learn: for more use the
-- outcome of its reservation, for less a row in the outbox.
-- UM002: the reservation was given away. UM003: the event has a correction already.
CREATE FUNCTION ingest.record_correction(
    p_org_id uuid, p_reservation_id uuid, p_slot smallint,
    p_event_id uuid, p_kind text, p_quantity_delta numeric, p_reason text, p_leaf_prefix bytea
) RETURNS timestamptz
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_epoch       bigint := ingest.enter_open_epoch(p_org_id);
    v_ingested_at timestamptz := clock_timestamp();
    v_event       ingest.usage_event;
BEGIN
    SELECT * INTO STRICT v_event FROM ingest.usage_event WHERE org_id = p_org_id AND event_id = p_event_id;

    INSERT INTO ingest.correction (
        org_id, event_id, kind, quantity_delta, reason, tenant_id, event_type, occurred_at, ingested_at, epoch, leaf_hash)
    VALUES (
        p_org_id, p_event_id, p_kind, p_quantity_delta, p_reason, v_event.tenant_id, v_event.event_type,
        v_event.occurred_at, v_ingested_at, v_epoch,
        sha256('\x00'::bytea || p_leaf_prefix || ingest.leaf_suffix(v_epoch, v_ingested_at)))
    ON CONFLICT ON CONSTRAINT correction_pkey DO NOTHING;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the event has a correction already' USING ERRCODE = 'UM003';
    END IF;

    IF p_quantity_delta < 0 THEN
        INSERT INTO ingest.quota_outbox (org_id, event_id, tenant_id, event_type, occurred_at, quantity)
        VALUES (p_org_id, p_event_id, v_event.tenant_id, v_event.event_type, v_event.occurred_at, p_quantity_delta);
    ELSE
        INSERT INTO ingest.reservation_outcome (org_id, reservation_id, outcome)
        VALUES (p_org_id, p_reservation_id, 'COMMITTED')
        ON CONFLICT ON CONSTRAINT reservation_outcome_pkey DO NOTHING;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'the reservation was given away' USING ERRCODE = 'UM002';
        END IF;
    END IF;

    -- In the order of record_events: days before hours.
    INSERT INTO ingest.usage_day AS rollup (
        org_id, tenant_id, event_type, day, epoch, slot, event_count, correction_count, quantity)
    VALUES (p_org_id, v_event.tenant_id, v_event.event_type, (v_event.occurred_at AT TIME ZONE 'UTC')::date,
            v_epoch, p_slot, 0, 1, p_quantity_delta)
    ON CONFLICT ON CONSTRAINT usage_day_pkey DO UPDATE
    SET correction_count = rollup.correction_count + 1,
        quantity = rollup.quantity + EXCLUDED.quantity;

    INSERT INTO ingest.usage_hour AS rollup (org_id, tenant_id, event_type, hour, slot, event_count, quantity)
    VALUES (p_org_id, v_event.tenant_id, v_event.event_type, date_trunc('hour', v_event.occurred_at, 'UTC'),
            p_slot, 0, p_quantity_delta)
    ON CONFLICT ON CONSTRAINT usage_hour_pkey DO UPDATE
    SET quantity = rollup.quantity + EXCLUDED.quantity;
    RETURN v_ingested_at;
END
$$;

-- Closes the open epoch and opens the next; null where the open one has no entry ingested before a
-- moment. Entries never go away, so they are looked for before the lock is taken: that may take as
-- long as reading the whole epoch. The lock is waited for as long as the caller's lock_timeout.
CREATE FUNCTION ingest.close_epoch(p_org_id uuid, p_ingested_before timestamptz, p_seal_job_id uuid) RETURNS bigint
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_epoch bigint;
BEGIN
    SELECT epoch INTO v_epoch FROM ingest.epoch
    WHERE org_id = p_org_id AND state = 'OPEN' AND opened_at < p_ingested_before;
    IF NOT FOUND OR NOT EXISTS (
        SELECT FROM ingest.usage_event
        WHERE org_id = p_org_id AND epoch = v_epoch AND ingested_at < p_ingested_before
        UNION ALL
        SELECT FROM ingest.correction
        WHERE org_id = p_org_id AND epoch = v_epoch AND ingested_at < p_ingested_before
    ) THEN
        RETURN NULL;
    END IF;
    PERFORM pg_advisory_xact_lock(ingest.ledger_lock_key(p_org_id));
    UPDATE ingest.epoch SET state = 'CLOSED', closed_at = clock_timestamp(), seal_job_id = p_seal_job_id
    WHERE org_id = p_org_id AND epoch = v_epoch AND state = 'OPEN';
    IF NOT FOUND THEN
        RETURN NULL;  -- somebody else closed it while we waited
    END IF;
    INSERT INTO ingest.epoch (org_id, epoch) VALUES (p_org_id, v_epoch + 1);
    RETURN v_epoch;
END
$$;

GRANT SELECT, INSERT ON ingest.usage_event, ingest.correction, ingest.snapshot TO usameter_ingest;
GRANT SELECT, INSERT, UPDATE ON ingest.epoch, ingest.usage_day, ingest.usage_hour, ingest.snapshot_mark TO usameter_ingest;
GRANT SELECT, INSERT, DELETE ON ingest.reservation_outcome, ingest.quota_outbox TO usameter_ingest;
