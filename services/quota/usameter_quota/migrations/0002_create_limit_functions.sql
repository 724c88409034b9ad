-- Locking heads; whose limit is which; periods and their use; what use has reached; changing limits.
--
-- Plans, here and in 0003: a cached plan is as old as its tables' statistics, that is minutes, in
-- which a table may grow from nothing to millions. So every access is written as a look-up by
-- primary key, and sequential scans, which win while a table is one page, are off. Generic plans
-- are forced since for small arrays PostgreSQL believes that planning anew each time pays: it
-- cost a group of one request 0.6 ms of 1.3.
--
-- New functions only: old code does not call them.

-- Not of a row: every reservation takes it, and rows that many lock shared cost a write each. One of 64 an
-- organization: all sessions of the server share one table of locks, which seven groups of 3,000 event types filled.
CREATE FUNCTION quota.default_lock_key(p_org_id uuid, p_event_type text)
RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $$
    SELECT hashtextextended(p_org_id::text || (hashtextextended(p_event_type, 2) & 63), 2)
$$;
COMMENT ON FUNCTION quota.default_lock_key IS
    'The advisory lock of an event type''s default, and of some others'': shared by whoever locks heads, exclusive for '
    'whoever changes it.';

CREATE FUNCTION quota.lock_heads(p_org_id uuid, p_tenant_ids text[], p_event_types text[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
AS $$
BEGIN
    -- A statement's snapshot is older than a lock it waits for, so limits and counters are read in
    -- later statements, which at READ COMMITTED see what was committed meanwhile. At any other
    -- level they would not, and a lowered limit would be overlooked.
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'quota heads are locked at READ COMMITTED, not %', current_setting('transaction_isolation');
    END IF;
    -- All in key order: equal keys in opposite order deadlock.
    PERFORM pg_advisory_xact_lock_shared(k.key)
    FROM (
        SELECT DISTINCT quota.default_lock_key(p_org_id, t.event_type) AS key
        FROM (SELECT DISTINCT unnest(p_event_types)) AS t (event_type)
        ORDER BY key
    ) AS k;
    INSERT INTO quota.quota_head (org_id, tenant_id, event_type)
    SELECT DISTINCT p_org_id, k.tenant_id, k.event_type
    FROM unnest(p_tenant_ids, p_event_types) AS k (tenant_id, event_type)
    ORDER BY k.tenant_id, k.event_type
    ON CONFLICT ON CONSTRAINT quota_head_pkey DO NOTHING;
    -- LATERAL leaves one plan, a look-up for each key; a join once read all heads of the organization.
    PERFORM 1
    FROM (
        SELECT DISTINCT k.tenant_id, k.event_type
        FROM unnest(p_tenant_ids, p_event_types) AS k (tenant_id, event_type)
        ORDER BY k.tenant_id, k.event_type
    ) AS k
    CROSS JOIN LATERAL (
        SELECT 1
        FROM quota.quota_head AS h
        WHERE h.org_id = p_org_id AND h.tenant_id = k.tenant_id AND h.event_type = k.event_type
        FOR UPDATE
    ) AS head;
END
$$;
COMMENT ON FUNCTION quota.lock_heads IS
    'Makes the heads of the keys (which may repeat) where they are missing, and locks them, in key order, until the '
    'transaction ends; before them the defaults of their event types, so that no default changes meanwhile.';

CREATE FUNCTION quota.limit_of(p_org_id uuid, p_tenant_id text, p_event_type text)
RETURNS SETOF quota.quota_limit
LANGUAGE sql STABLE ROWS 1
AS $$
    SELECT *
    FROM quota.quota_limit AS l
    WHERE l.org_id = p_org_id AND l.event_type = p_event_type
        AND l.tenant_id = coalesce(
            (
                SELECT own.tenant_id
                FROM quota.quota_limit AS own
                WHERE own.org_id = p_org_id AND own.tenant_id = p_tenant_id AND own.event_type = p_event_type
            ),
            ''
        )
    -- LIMIT keeps this a look-up by primary key; see quota.lock_heads.
    LIMIT 1
$$;
COMMENT ON FUNCTION quota.limit_of IS
    'The limit in force for a tenant: its own, whatever its mode, else the organization''s default; no row: none.';

CREATE FUNCTION quota.period_of(p_period text, p_moment timestamptz, p_now timestamptz)
RETURNS TABLE (
    counted_from timestamptz, counted_until timestamptz, ends_at timestamptz, period_key timestamptz
)
LANGUAGE sql STABLE ROWS 1
AS $$
    SELECT
        span.first AT TIME ZONE 'UTC',
        CASE p_period WHEN 'ROLLING_30D' THEN 'infinity' ELSE span.last AT TIME ZONE 'UTC' END,
        span.last AT TIME ZONE 'UTC',
        CASE p_period WHEN 'ROLLING_30D' THEN '-infinity' ELSE span.first AT TIME ZONE 'UTC' END
    FROM (
        SELECT
            CASE p_period
                WHEN 'HOURLY' THEN date_trunc('hour', p_moment AT TIME ZONE 'UTC')
                WHEN 'DAILY' THEN date_trunc('day', p_moment AT TIME ZONE 'UTC')
                WHEN 'MONTHLY' THEN date_trunc('month', p_moment AT TIME ZONE 'UTC')
                WHEN 'ROLLING_30D' THEN date_trunc('day', p_now AT TIME ZONE 'UTC') - interval '29 days'
            END AS first,
            CASE p_period
                WHEN 'HOURLY' THEN date_trunc('hour', p_moment AT TIME ZONE 'UTC') + interval '1 hour'
                WHEN 'DAILY' THEN date_trunc('day', p_moment AT TIME ZONE 'UTC') + interval '1 day'
                WHEN 'MONTHLY' THEN date_trunc('month', p_moment AT TIME ZONE 'UTC') + interval '1 month'
                WHEN 'ROLLING_30D' THEN date_trunc('day', p_now AT TIME ZONE 'UTC') + interval '1 day'
            END AS last
    ) AS span
$$;
COMMENT ON FUNCTION quota.period_of IS
    'The period that a moment is judged in: calendar periods by the moment; the rolling window always by now '
    '(from today - 29 on, without end, since an event may be dated five minutes ahead), whether or not it holds the moment. '
    'period_key names it in quota.limit_state.';

-- Returns a table because PostgreSQL inlines such a function into the calling query and a scalar
-- one with sub-queries it does not.
CREATE FUNCTION quota.period_use(
    p_org_id uuid, p_tenant_id text, p_event_type text,
    p_period text, p_counted_from timestamptz, p_counted_until timestamptz
)
RETURNS TABLE (quantity numeric)
LANGUAGE sql STABLE ROWS 1
AS $$
    SELECT coalesce(
        CASE
            WHEN p_period = 'HOURLY' THEN (
                SELECT h.quantity
                FROM quota.usage_hour AS h
                WHERE h.org_id = p_org_id AND h.tenant_id = p_tenant_id AND h.event_type = p_event_type
                    AND h.hour = p_counted_from
            )
            ELSE (
                SELECT sum(d.quantity)
                FROM quota.usage_day AS d
                WHERE d.org_id = p_org_id AND d.tenant_id = p_tenant_id AND d.event_type = p_event_type
                    AND d.day >= (p_counted_from AT TIME ZONE 'UTC')::date
                    AND d.day < (p_counted_until AT TIME ZONE 'UTC')::date
            )
        END,
        0
    )
$$;
COMMENT ON FUNCTION quota.period_use IS 'Units counted within a span that quota.period_of returned; one row.';

CREATE FUNCTION quota.open_use(p_org_id uuid)
RETURNS TABLE (tenant_id text, event_type text, hour timestamptz, quantity numeric)
LANGUAGE sql STABLE
AS $$
    SELECT i.tenant_id, i.event_type, i.hour, i.quantity
    FROM quota.reservation AS r
    CROSS JOIN LATERAL unnest(r.tenant_ids, r.event_types, r.hours, r.quantities)
        AS i (tenant_id, event_type, hour, quantity)
    WHERE r.org_id = p_org_id AND r.state = 'OPEN'
$$;
COMMENT ON FUNCTION quota.open_use IS
    'What open reservations hold. Counters less this is what is stored: what a limit''s lines are reached by.';

CREATE FUNCTION quota.watch_reservations(p_org_id uuid, p_event_types text[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
AS $$
DECLARE
    v_open uuid[];
BEGIN
    -- Which, without an order: for one the primary key would be read, closed reservations and all.
    SELECT array_agg(r.reservation_id)
    INTO v_open
    FROM quota.reservation AS r
    WHERE r.org_id = p_org_id AND r.state = 'OPEN' AND NOT r.watched
        -- Of a hold nothing becomes stored but by the reservation that claims it.
        AND r.public_id IS NULL
        AND r.event_types && ARRAY(SELECT DISTINCT unnest(p_event_types));
    -- In the order in which quota.settle locks them. One that is being committed is waited for: it
    -- is counted as stored then.
    PERFORM 1
    FROM quota.reservation AS r
    WHERE r.org_id = p_org_id AND r.reservation_id = ANY (v_open)
    ORDER BY r.reservation_id
    FOR UPDATE;
    UPDATE quota.reservation AS r
    SET watched = true
    WHERE r.org_id = p_org_id AND r.reservation_id = ANY (v_open) AND r.state = 'OPEN';
END
$$;
COMMENT ON FUNCTION quota.watch_reservations IS
    'Has those who commit the open reservations of these event types lock heads and look what was reached; others, '
    'which are nearly all, touch no head. By event type alone: which tenants are meant would be dearer to find out '
    'than to look for nothing. Once it returns, what is stored on a head changes only under the head''s lock.';

CREATE FUNCTION quota.append_events(p_org_id uuid, p_events quota.quota_event[])
RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    IF p_events IS NULL THEN
        RETURN;
    END IF;
    -- Held until the commit, so that positions become visible in their order. Whoever has this lock
    -- waits for no other.
    PERFORM pg_advisory_xact_lock(hashtextextended(p_org_id::text, 3));
    INSERT INTO quota.quota_event (
        org_id, position, type, tenant_id, event_type, occurred_at, limit_value, enforcement_mode, period,
        soft_limit_percent, period_start, period_end, stored, grace_ends_at
    )
    SELECT p_org_id, last.position + e.number, e.type, e.tenant_id, e.event_type, e.occurred_at, e.limit_value,
        e.enforcement_mode, e.period, e.soft_limit_percent, e.period_start, e.period_end, e.stored, e.grace_ends_at
    FROM (
        SELECT coalesce(max(q.position), 0) AS position
        FROM quota.quota_event AS q
        WHERE q.org_id = p_org_id
    ) AS last
    CROSS JOIN unnest(p_events) WITH ORDINALITY AS e (
        org_id, position, type, tenant_id, event_type, occurred_at, limit_value, enforcement_mode, period,
        soft_limit_percent, period_start, period_end, stored, grace_ends_at, number
    );
END
$$;
COMMENT ON FUNCTION quota.append_events IS
    'Writes events under the organization''s next positions; the last thing that a transaction does. Null: none.';

CREATE FUNCTION quota.record_reached(
    p_org_id uuid, p_now timestamptz, p_tenant_ids text[], p_event_types text[], p_hours timestamptz[]
)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
AS $$
DECLARE
    v_events quota.quota_event[];
BEGIN
    PERFORM quota.watch_reservations(p_org_id, p_event_types);
    WITH open_use AS MATERIALIZED (
        SELECT *
        FROM quota.open_use(p_org_id)
    ),
    line AS MATERIALIZED (
        SELECT DISTINCT c.tenant_id, c.event_type, l.limit_value, l.enforcement_mode, l.period, l.soft_limit_percent,
            l.grace_period_hours, p.counted_from, p.counted_until, p.ends_at, p.period_key
        FROM unnest(p_tenant_ids, p_event_types, p_hours) AS c (tenant_id, event_type, hour)
        CROSS JOIN LATERAL quota.limit_of(p_org_id, c.tenant_id, c.event_type) AS l
        CROSS JOIN LATERAL quota.period_of(l.period, c.hour, p_now) AS p
        -- What comes late, for a period that has ended, is only counted.
        WHERE l.enforcement_mode <> 'DISABLED' AND p.ends_at > p_now AND c.hour >= p.counted_from
    ),
    open_of_line AS (
        SELECT line.tenant_id, line.event_type, line.period_key, sum(o.quantity) AS quantity
        FROM line
        JOIN open_use AS o ON o.tenant_id = line.tenant_id AND o.event_type = line.event_type
            AND o.hour >= line.counted_from AND o.hour < line.counted_until
        GROUP BY line.tenant_id, line.event_type, line.period_key
    ),
    measured AS (
        SELECT line.*, used.quantity - coalesce(o.quantity, 0) AS stored
        FROM line
        CROSS JOIN LATERAL quota.period_use(
            p_org_id, line.tenant_id, line.event_type, line.period, line.counted_from, line.counted_until
        ) AS used
        LEFT JOIN open_of_line AS o
            ON o.tenant_id = line.tenant_id AND o.event_type = line.event_type AND o.period_key = line.period_key
    ),
    reached AS MATERIALIZED (
        SELECT m.*, s.org_id IS NULL AS is_new,
            m.stored >= m.limit_value AND s.limit_reached IS NOT TRUE AS reaches_limit,
            CASE
                WHEN m.grace_period_hours IS NOT NULL AND m.stored > m.limit_value AND s.grace_ends_at IS NULL
                -- A grace ends with its period; the rolling window has no end.
                THEN least(
                    p_now + make_interval(hours => m.grace_period_hours),
                    CASE WHEN m.period <> 'ROLLING_30D' THEN m.ends_at END
                )
            END AS grace_ends_at
        FROM measured AS m
        LEFT JOIN quota.limit_state AS s
            ON s.org_id = p_org_id AND s.tenant_id = m.tenant_id AND s.event_type = m.event_type
            AND s.period_key = m.period_key
        WHERE m.stored > 0 AND m.stored >= m.limit_value * m.soft_limit_percent * 0.01
    ),
    saved AS (
        INSERT INTO quota.limit_state AS s (
            org_id, tenant_id, event_type, period_key, period_end, limit_reached, grace_ends_at
        )
        SELECT p_org_id, r.tenant_id, r.event_type, r.period_key, r.ends_at, r.stored >= r.limit_value, r.grace_ends_at
        FROM reached AS r
        WHERE r.is_new OR r.reaches_limit OR r.grace_ends_at IS NOT NULL
        ON CONFLICT ON CONSTRAINT limit_state_pkey DO UPDATE
        SET limit_reached = s.limit_reached OR EXCLUDED.limit_reached,
            grace_ends_at = coalesce(s.grace_ends_at, EXCLUDED.grace_ends_at)
    )
    SELECT array_agg(
        ROW(
            p_org_id, NULL, e.type, r.tenant_id, r.event_type, p_now, r.limit_value, r.enforcement_mode, r.period,
            r.soft_limit_percent, r.counted_from, r.ends_at, r.stored,
            CASE e.type WHEN 'GRACE_STARTED' THEN r.grace_ends_at END
        )::quota.quota_event
        ORDER BY r.tenant_id, r.event_type, r.counted_from, e.number
    )
    INTO v_events
    FROM reached AS r
    CROSS JOIN LATERAL (
        VALUES
            (1, 'SOFT_LIMIT_REACHED', r.is_new),
            (2, 'LIMIT_REACHED', r.reaches_limit),
            (3, 'GRACE_STARTED', r.grace_ends_at IS NOT NULL)
    ) AS e (number, type, happened)
    WHERE e.happened;
    PERFORM quota.append_events(p_org_id, v_events);
END
$$;
COMMENT ON FUNCTION quota.record_reached IS
    'Records which lines of their limits the stored use of heads has reached, in the periods that hold these hours, and '
    'writes an event for each that it had not reached before; the heads must be locked. To be called whenever a '
    'counter, or what is stored of it, may have come to a line; and when a limit is set.';

CREATE FUNCTION quota.end_periods(p_org_id uuid, p_now timestamptz, p_tenant_ids text[], p_event_types text[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
AS $$
DECLARE
    v_events quota.quota_event[];
BEGIN
    PERFORM quota.lock_heads(p_org_id, p_tenant_ids, p_event_types);
    PERFORM quota.watch_reservations(p_org_id, p_event_types);
    WITH open_use AS MATERIALIZED (
        SELECT *
        FROM quota.open_use(p_org_id)
    ),
    line AS MATERIALIZED (
        SELECT s.*, l.limit_value, l.enforcement_mode, l.period, l.soft_limit_percent,
            p.counted_from, p.counted_until, p.ends_at
        FROM (SELECT DISTINCT * FROM unnest(p_tenant_ids, p_event_types)) AS k (tenant_id, event_type)
        CROSS JOIN LATERAL (
            SELECT *
            FROM quota.limit_state
            WHERE limit_state.org_id = p_org_id AND limit_state.tenant_id = k.tenant_id
                AND limit_state.event_type = k.event_type AND limit_state.period_end <= p_now
        ) AS s
        CROSS JOIN LATERAL quota.limit_of(p_org_id, s.tenant_id, s.event_type) AS l
        CROSS JOIN LATERAL quota.period_of(l.period, s.period_key, p_now) AS p
    ),
    -- A join: to read all that is open for each of 500 lines took 3.4 s where 50,000 holds were.
    open_of_line AS (
        SELECT line.tenant_id, line.event_type, line.period_key, sum(o.quantity) AS quantity
        FROM line
        JOIN open_use AS o ON o.tenant_id = line.tenant_id AND o.event_type = line.event_type
            AND o.hour >= line.counted_from AND o.hour < line.counted_until
        GROUP BY line.tenant_id, line.event_type, line.period_key
    ),
    measured AS (
        SELECT line.*, used.quantity - coalesce(o.quantity, 0) AS stored
        FROM line
        CROSS JOIN LATERAL quota.period_use(
            p_org_id, line.tenant_id, line.event_type, line.period, line.counted_from, line.counted_until
        ) AS used
        LEFT JOIN open_of_line AS o
            ON o.tenant_id = line.tenant_id AND o.event_type = line.event_type AND o.period_key = line.period_key
    ),
    due AS MATERIALIZED (
        -- Only the rolling window is one that goes on; what its use is still at stays reached.
        SELECT m.*,
            m.ends_at > p_now AND m.stored > 0 AND m.stored >= m.limit_value * m.soft_limit_percent * 0.01 AS stays,
            m.limit_reached AND m.ends_at > p_now AND m.stored > 0 AND m.stored >= m.limit_value AS stays_at_limit
        FROM measured AS m
    ),
    ended AS (
        DELETE FROM quota.limit_state AS s
        USING due
        WHERE s.org_id = p_org_id AND s.tenant_id = due.tenant_id AND s.event_type = due.event_type
            AND s.period_key = due.period_key AND NOT due.stays
    ),
    moved AS (
        UPDATE quota.limit_state AS s
        SET period_end = due.ends_at, limit_reached = due.stays_at_limit,
            grace_ends_at = CASE WHEN due.stays_at_limit THEN s.grace_ends_at END
        FROM due
        WHERE s.org_id = p_org_id AND s.tenant_id = due.tenant_id AND s.event_type = due.event_type
            AND s.period_key = due.period_key AND due.stays
    )
    SELECT array_agg(
        ROW(
            p_org_id, NULL, 'RESET', d.tenant_id, d.event_type, d.period_end, d.limit_value, d.enforcement_mode,
            d.period, d.soft_limit_percent, d.counted_from, d.ends_at, d.stored, NULL
        )::quota.quota_event
        ORDER BY d.period_end, d.tenant_id, d.event_type
    )
    INTO v_events
    FROM due AS d
    WHERE d.limit_reached AND NOT d.stays_at_limit;
    PERFORM quota.append_events(p_org_id, v_events);
END
$$;
COMMENT ON FUNCTION quota.end_periods IS
    'Forgets what these heads reached in periods that have ended, and in the rolling window what its use is no longer '
    'at; writes RESET where that was the limit. The only place that does.';

CREATE FUNCTION quota.begin_limit(p_org_id uuid, p_now timestamptz, p_tenant_id text, p_event_type text)
RETURNS void
LANGUAGE plpgsql VOLATILE
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
AS $$
BEGIN
    IF p_tenant_id = '' THEN
        DELETE FROM quota.limit_state AS s
        WHERE s.org_id = p_org_id AND s.event_type = p_event_type AND NOT EXISTS (
            SELECT 1
            FROM quota.quota_limit AS own
            WHERE own.org_id = p_org_id AND own.tenant_id = s.tenant_id AND own.event_type = p_event_type
        );
    ELSE
        DELETE FROM quota.limit_state AS s
        WHERE s.org_id = p_org_id AND s.tenant_id = p_tenant_id AND s.event_type = p_event_type;
        PERFORM quota.record_reached(p_org_id, p_now, ARRAY[p_tenant_id], ARRAY[p_event_type], ARRAY[p_now]);
    END IF;
END
$$;
COMMENT ON FUNCTION quota.begin_limit IS
    'Forgets what was reached of a limit that is no more, and records what the use of the period has reached already '
    'of the one in force now. Of a default, whose lock stops everybody, each tenant''s next request records that.';

CREATE FUNCTION quota.set_limit(
    p_org_id uuid, p_tenant_id text, p_event_type text, p_now timestamptz, p_changed_by text,
    p_limit_value numeric, p_enforcement_mode text, p_period text, p_soft_limit_percent smallint,
    p_grace_period_hours smallint
)
RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    v_version bigint;
BEGIN
    PERFORM quota.lock_limit(p_org_id, p_tenant_id, p_event_type);
    -- A retry changes nothing; in particular not `set_at`, which would set earlier periods free.
    PERFORM 1
    FROM quota.quota_limit AS l
    WHERE l.org_id = p_org_id AND l.tenant_id = p_tenant_id AND l.event_type = p_event_type
        AND l.limit_value = p_limit_value AND l.enforcement_mode = p_enforcement_mode
        AND l.period = p_period AND l.soft_limit_percent = p_soft_limit_percent
        AND l.grace_period_hours IS NOT DISTINCT FROM p_grace_period_hours;
    IF FOUND THEN
        RETURN;
    END IF;
    INSERT INTO quota.limit_change (
        org_id, tenant_id, event_type, version, changed_at, changed_by,
        limit_value, enforcement_mode, period, soft_limit_percent, grace_period_hours, current
    )
    SELECT p_org_id, p_tenant_id, p_event_type, quota.next_version(p_org_id, p_tenant_id, p_event_type),
        p_now, p_changed_by, p_limit_value, p_enforcement_mode, p_period, p_soft_limit_percent, p_grace_period_hours,
        used.quantity
    FROM quota.period_of(p_period, p_now, p_now) AS p
    CROSS JOIN LATERAL quota.period_use(
        p_org_id, p_tenant_id, p_event_type, p_period, p.counted_from, p.counted_until
    ) AS used
    RETURNING version INTO v_version;
    INSERT INTO quota.quota_limit AS l (
        org_id, tenant_id, event_type, version, limit_value, enforcement_mode, period, soft_limit_percent,
        grace_period_hours, set_at
    )
    VALUES (
        p_org_id, p_tenant_id, p_event_type, v_version, p_limit_value, p_enforcement_mode, p_period,
        p_soft_limit_percent, p_grace_period_hours, p_now
    )
    ON CONFLICT ON CONSTRAINT quota_limit_pkey DO UPDATE
    SET version = EXCLUDED.version, limit_value = EXCLUDED.limit_value,
        enforcement_mode = EXCLUDED.enforcement_mode, period = EXCLUDED.period,
        soft_limit_percent = EXCLUDED.soft_limit_percent,
        grace_period_hours = EXCLUDED.grace_period_hours, set_at = EXCLUDED.set_at;
    PERFORM quota.begin_limit(p_org_id, p_now, p_tenant_id, p_event_type);
END
$$;
COMMENT ON FUNCTION quota.set_limit IS
    'Sets or replaces the limit of a head, or with an empty tenant the default, and logs the change; equal values are '
    'no change.';

CREATE FUNCTION quota.delete_limit(
    p_org_id uuid, p_tenant_id text, p_event_type text, p_now timestamptz, p_changed_by text
)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    v_period text;
BEGIN
    PERFORM quota.lock_limit(p_org_id, p_tenant_id, p_event_type);
    DELETE FROM quota.quota_limit AS l
    WHERE l.org_id = p_org_id AND l.tenant_id = p_tenant_id AND l.event_type = p_event_type
    RETURNING l.period INTO v_period;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO quota.limit_change (org_id, tenant_id, event_type, version, changed_at, changed_by, current)
    SELECT p_org_id, p_tenant_id, p_event_type, quota.next_version(p_org_id, p_tenant_id, p_event_type),
        p_now, p_changed_by, used.quantity
    FROM quota.period_of(v_period, p_now, p_now) AS p
    CROSS JOIN LATERAL quota.period_use(
        p_org_id, p_tenant_id, p_event_type, v_period, p.counted_from, p.counted_until
    ) AS used;
    PERFORM quota.begin_limit(p_org_id, p_now, p_tenant_id, p_event_type);
    RETURN true;
END
$$;
COMMENT ON FUNCTION quota.delete_limit IS
    'Removes the limit of a head, or with an empty tenant the default, and logs that; false: there was none.';

CREATE FUNCTION quota.lock_limit(p_org_id uuid, p_tenant_id text, p_event_type text)
RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    IF p_tenant_id = '' THEN
        PERFORM pg_advisory_xact_lock(quota.default_lock_key(p_org_id, p_event_type));
    END IF;
    PERFORM quota.lock_heads(p_org_id, ARRAY[p_tenant_id], ARRAY[p_event_type]);
END
$$;
COMMENT ON FUNCTION quota.lock_limit IS
    'Locks the head whose limit is to be changed; for a default, whose head has the empty tenant, every head of its '
    'event type: nobody holds one without the default''s lock.';

CREATE FUNCTION quota.next_version(p_org_id uuid, p_tenant_id text, p_event_type text)
RETURNS bigint
LANGUAGE sql STABLE
AS $$
    SELECT coalesce(max(c.version), 0) + 1
    FROM quota.limit_change AS c
    WHERE c.org_id = p_org_id AND c.tenant_id = p_tenant_id AND c.event_type = p_event_type
$$;
COMMENT ON FUNCTION quota.next_version IS 'Number of the next change of a head''s limit; the head must be locked.';

REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA quota FROM PUBLIC;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA quota TO usameter_quota;
