-- Deciding, reserving, settling, adjusting.
--
-- New functions only: old code does not call them.

CREATE FUNCTION quota.decide(
    p_org_id uuid, p_now timestamptz,
    p_tenant_ids text[], p_event_types text[], p_hours timestamptz[], p_totals numeric[],
    p_request_numbers integer[], p_cell_numbers integer[], p_quantities text[],
    OUT findings jsonb, OUT reaching integer[]
)
RETURNS record
LANGUAGE plpgsql STABLE
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
AS $$
DECLARE
    -- A line is a limit in one of its periods; these arrays are indexed by its number.
    v_lines            integer := 0;
    v_line_cell        integer[] := '{}';
    v_line_refuses     boolean[] := '{}';
    v_line_limit       numeric[] := '{}';
    v_line_warning     numeric[] := '{}';
    v_line_used        numeric[] := '{}';
    v_line_next        numeric[] := '{}';
    v_line_reset       timestamptz[] := '{}';
    -- Line of each cell, 0: none.
    v_cell_line        integer[] := array_fill(0, ARRAY[cardinality(p_totals)]);
    -- Findings, one element each. Appending to jsonb copies all of it: quadratic in a group of 1,000.
    v_found_request    integer[] := '{}';
    v_found_kind       text[] := '{}';
    v_found_line       integer[] := '{}';
    v_found_current    numeric[] := '{}';
    v_found_requested  numeric[] := '{}';
    v_tight            record;
    v_request          record;
    v_refused          boolean;
    v_cell             integer;
    v_line             integer;
    v_after            numeric;
BEGIN
    -- Only lines that the whole group together takes to their warning line can refuse or warn;
    -- mostly there are none, and the group is done without looking at its requests one by one.
    FOR v_tight IN
        SELECT line.*, used.quantity AS used,
            -- Not a join, which would look up what few lines have before it knows which they are.
            (
                SELECT s
                FROM quota.limit_state AS s
                WHERE s.org_id = p_org_id AND s.tenant_id = line.tenant_id AND s.event_type = line.event_type
                    AND s.period_key = line.period_key
            ) AS state
        FROM (
            SELECT c.tenant_id, c.event_type, l.period, l.enforcement_mode, l.limit_value, l.grace_period_hours,
                -- Not / 100: numeric division rounds.
                l.limit_value * l.soft_limit_percent * 0.01 AS warning_line,
                p.counted_from, p.counted_until, p.ends_at, p.period_key,
                sum(c.total) AS requested, array_agg(c.number) AS cells
            FROM unnest(p_tenant_ids, p_event_types, p_hours, p_totals)
                WITH ORDINALITY AS c (tenant_id, event_type, hour, total, number)
            CROSS JOIN LATERAL quota.limit_of(p_org_id, c.tenant_id, c.event_type) AS l
            CROSS JOIN LATERAL quota.period_of(l.period, c.hour, p_now) AS p
            WHERE l.enforcement_mode <> 'DISABLED'
                -- What happened in periods that were over before the limit was set, or before the
                -- rolling window begins, is only counted.
                AND p.ends_at > l.set_at
                AND c.hour >= p.counted_from
            GROUP BY c.tenant_id, c.event_type, l.period, l.enforcement_mode, l.limit_value,
                l.soft_limit_percent, l.grace_period_hours, p.counted_from, p.counted_until, p.ends_at, p.period_key
        ) AS line
        CROSS JOIN LATERAL quota.period_use(
            p_org_id, line.tenant_id, line.event_type, line.period, line.counted_from, line.counted_until
        ) AS used
        WHERE used.quantity + line.requested >= line.warning_line
        ORDER BY line.tenant_id, line.event_type, line.counted_from
    LOOP
        v_lines := v_lines + 1;
        v_line_cell := v_line_cell || v_tight.cells[1];
        v_line_refuses := v_line_refuses || (
            v_tight.enforcement_mode = 'HARD'
            -- A grace ends with its period: what comes late is let through.
            OR coalesce((v_tight.state).grace_ends_at <= p_now AND v_tight.ends_at > p_now, false)
        );
        v_line_limit := v_line_limit || v_tight.limit_value;
        v_line_warning := v_line_warning || v_tight.warning_line;
        v_line_used := v_line_used || v_tight.used;
        v_line_next := v_line_next || CASE
            WHEN v_tight.ends_at <= p_now THEN NULL
            WHEN (v_tight.state).limit_reached IS NULL THEN v_tight.warning_line
            WHEN NOT (v_tight.state).limit_reached
                OR (v_tight.grace_period_hours IS NOT NULL AND (v_tight.state).grace_ends_at IS NULL)
            THEN v_tight.limit_value
        END;
        -- A period that is over never resets for what happened in it.
        v_line_reset := v_line_reset || CASE WHEN v_tight.ends_at > p_now THEN v_tight.ends_at END;
        FOREACH v_cell IN ARRAY v_tight.cells LOOP
            v_cell_line[v_cell] := v_lines;
        END LOOP;
    END LOOP;
    IF v_lines = 0 THEN
        RETURN;
    END IF;

    FOR v_request IN
        SELECT demand.number, array_agg(demand.line) AS lines, array_agg(demand.quantity) AS quantities
        FROM (
            SELECT i.number, v_cell_line[i.cell] AS line, sum(i.quantity::numeric) AS quantity
            FROM unnest(p_request_numbers, p_cell_numbers, p_quantities) AS i (number, cell, quantity)
            WHERE v_cell_line[i.cell] > 0
            GROUP BY 1, 2
            ORDER BY 1, 2
        ) AS demand
        GROUP BY demand.number
        ORDER BY demand.number
    LOOP
        v_refused := false;
        FOR n IN 1 .. cardinality(v_request.lines) LOOP
            v_line := v_request.lines[n];
            IF v_line_refuses[v_line] AND v_line_used[v_line] + v_request.quantities[n] > v_line_limit[v_line] THEN
                v_refused := true;
                v_found_request := v_found_request || v_request.number;
                v_found_kind := v_found_kind || 'REFUSED'::text;
                v_found_line := v_found_line || v_line;
                v_found_current := v_found_current || v_line_used[v_line];
                v_found_requested := v_found_requested || v_request.quantities[n];
            END IF;
        END LOOP;
        CONTINUE WHEN v_refused;
        FOR n IN 1 .. cardinality(v_request.lines) LOOP
            v_line := v_request.lines[n];
            v_after := v_line_used[v_line] + v_request.quantities[n];
            IF v_after > v_line_warning[v_line] THEN
                v_found_request := v_found_request || v_request.number;
                v_found_kind := v_found_kind
                    || CASE WHEN v_after > v_line_limit[v_line] THEN 'QUOTA_EXCEEDED' ELSE 'QUOTA_SOFT_LIMIT' END;
                v_found_line := v_found_line || v_line;
                v_found_current := v_found_current || v_line_used[v_line];
                v_found_requested := v_found_requested || v_request.quantities[n];
            END IF;
            v_line_used[v_line] := v_after;
        END LOOP;
    END LOOP;

    SELECT jsonb_agg(
        jsonb_build_object(
            'request', f.request,
            'kind', f.kind,
            'tenant_id', p_tenant_ids[v_line_cell[f.line]],
            'event_type', p_event_types[v_line_cell[f.line]],
            -- Text: a reader of JSON numbers may take them for doubles.
            'limit', v_line_limit[f.line]::text,
            'current', f.current::text,
            'requested', f.requested::text,
            'reset_at', v_line_reset[f.line]
        )
        ORDER BY f.number
    )
    INTO findings
    FROM unnest(v_found_request, v_found_kind, v_found_line, v_found_current, v_found_requested)
        WITH ORDINALITY AS f (request, kind, line, current, requested, number);
    SELECT array_agg(l.cell)
    INTO reaching
    FROM unnest(v_line_cell, v_line_used, v_line_next) AS l (cell, used, next)
    WHERE l.used >= l.next;
END
$$;
COMMENT ON FUNCTION quota.decide IS
    'Judges a group of requests in order, each whole: a request that a limit refuses takes nothing, one that '
    'is admitted counts for those after it. Reads only; binding for a caller that holds the heads. '
    'Cells are the distinct (tenant, event type, hour) of the group with their totals, numbered from 1; an item is '
    'what a request (numbered from 0) asks of a cell. Returns what is to be said, or null: [{request, kind: REFUSED | '
    'QUOTA_SOFT_LIMIT | QUOTA_EXCEEDED, tenant_id, event_type, limit, current (before the request), requested, '
    'reset_at}], by request and key. Requests without REFUSED are admitted. `reaching` are cells, one of each limit '
    'whose counter comes to a line that stored use has not been recorded to have reached; null: none.';

CREATE TYPE quota.claim AS (
    reservation_id uuid, item integer, request integer, cell integer, moves boolean,
    hour timestamptz, held numeric, credit numeric
);
COMMENT ON TYPE quota.claim IS
    'What an item takes of the hold that it names, held in `hour`. Where that is of the item''s own period the hold '
    'moves to the item''s hour, and the item needs `credit` less; else it needs all it asks for, and credit is 0.';

CREATE FUNCTION quota.find_claims(
    p_org_id uuid, p_now timestamptz, p_tenant_ids text[], p_event_types text[], p_hours timestamptz[],
    p_request_numbers integer[], p_cell_numbers integer[], p_quantities text[],
    p_claim_items integer[], p_claim_ids uuid[]
)
RETURNS SETOF quota.claim
LANGUAGE plpgsql STABLE
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
AS $$
DECLARE
    v_public_id  text;
BEGIN
    SELECT h.public_id
    INTO v_public_id
    FROM unnest(p_claim_items, p_claim_ids) AS n (item, reservation_id)
    JOIN quota.reservation AS h ON h.org_id = p_org_id AND h.reservation_id = n.reservation_id
    WHERE h.held_quantity IS NOT NULL
        AND (h.tenant_ids[1], h.event_types[1])
            <> (p_tenant_ids[p_cell_numbers[n.item]], p_event_types[p_cell_numbers[n.item]])
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION '%', v_public_id USING ERRCODE = 'UM101';
    END IF;
    RETURN QUERY
    SELECT h.reservation_id, i.item, p_request_numbers[i.item], i.cell, period.is_same, h.hours[1], h.held_quantity,
        CASE WHEN period.is_same THEN least(h.held_quantity, p_quantities[i.item]::numeric) ELSE 0 END
    FROM (
        SELECT DISTINCT ON (n.reservation_id) n.reservation_id, n.item, p_cell_numbers[n.item] AS cell
        FROM unnest(p_claim_items, p_claim_ids) AS n (item, reservation_id)
        ORDER BY n.reservation_id, n.item
    ) AS i
    JOIN quota.reservation AS h ON h.org_id = p_org_id AND h.reservation_id = i.reservation_id
    LEFT JOIN LATERAL quota.limit_of(p_org_id, p_tenant_ids[i.cell], p_event_types[i.cell]) AS l ON true
    CROSS JOIN LATERAL quota.period_of(l.period, h.hours[1], p_now) AS of_hold
    CROSS JOIN LATERAL quota.period_of(l.period, p_hours[i.cell], p_now) AS of_item
    CROSS JOIN LATERAL (
        SELECT l.period IS NULL OR (
            of_hold.counted_from = of_item.counted_from
            -- The rolling window is one for all moments, whether or not it holds them.
            AND (h.hours[1] >= of_hold.counted_from) = (p_hours[i.cell] >= of_item.counted_from)
        ) AS is_same
    ) AS period
    WHERE h.state = 'OPEN' AND h.claimed_by IS NULL;
END
$$;
COMMENT ON FUNCTION quota.find_claims IS
    'The holds that items of a group name, `p_claim_items` (numbered from 1) naming `p_claim_ids`, as far as they are '
    'there to be taken: the first item that names one has it, and one that is closed or claimed nobody has. The heads '
    'must be locked. Fails with UM101, and the id as message, where a hold is of another tenant or event type.';

CREATE FUNCTION quota.reserve(
    p_org_id uuid, p_reservation_id uuid, p_now timestamptz, p_request_count integer,
    p_tenant_ids text[], p_event_types text[], p_hours timestamptz[], p_totals numeric[],
    p_request_numbers integer[], p_cell_numbers integer[], p_quantities text[],
    p_claim_items integer[], p_claim_ids uuid[],
    OUT state text, OUT request_count integer, OUT findings jsonb
)
RETURNS record
LANGUAGE plpgsql VOLATILE
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
AS $$
DECLARE
    v_tenant_ids   text[] := p_tenant_ids;
    v_event_types  text[] := p_event_types;
    v_hours        timestamptz[] := p_hours;
    v_quantities   numeric[] := p_totals;
    v_claims       quota.claim[];
    v_claim        quota.claim;
    -- What is to be judged, less what claims bring; null: nothing is claimed.
    v_needed_totals      numeric[];
    v_needed_requests    integer[];
    v_needed_cells       integer[];
    v_needed_quantities  text[];
    v_reaching     integer[];
BEGIN
    PERFORM quota.lock_heads(p_org_id, p_tenant_ids, p_event_types);
    state := 'OPEN';
    request_count := p_request_count;
    IF p_claim_ids <> '{}' THEN
        SELECT array_agg(c)
        INTO v_claims
        FROM quota.find_claims(
            p_org_id, p_now, p_tenant_ids, p_event_types, p_hours, p_request_numbers, p_cell_numbers, p_quantities,
            p_claim_items, p_claim_ids
        ) AS c;
    END IF;
    IF v_claims IS NOT NULL THEN
        SELECT array_agg(
            t.total - (SELECT coalesce(sum(c.credit), 0) FROM unnest(v_claims) AS c WHERE c.cell = t.number)
            ORDER BY t.number
        )
        INTO v_needed_totals
        FROM unnest(p_totals) WITH ORDINALITY AS t (total, number);
        -- An item that needs nothing more is refused by nothing, not even by a limit that was lowered since.
        SELECT coalesce(array_agg(n.request), '{}'), coalesce(array_agg(n.cell), '{}'),
            coalesce(array_agg(n.needed::text), '{}')
        INTO v_needed_requests, v_needed_cells, v_needed_quantities
        FROM (
            SELECT i.request, i.cell, i.quantity::numeric - coalesce(c.credit, 0) AS needed
            FROM unnest(p_request_numbers, p_cell_numbers, p_quantities)
                WITH ORDINALITY AS i (request, cell, quantity, number)
            LEFT JOIN unnest(v_claims) AS c ON c.item = i.number
        ) AS n
        WHERE n.needed > 0;
    END IF;
    SELECT d.findings, d.reaching
    INTO findings, v_reaching
    FROM quota.decide(
        p_org_id, p_now, p_tenant_ids, p_event_types, p_hours, coalesce(v_needed_totals, p_totals),
        coalesce(v_needed_requests, p_request_numbers), coalesce(v_needed_cells, p_cell_numbers),
        coalesce(v_needed_quantities, p_quantities)
    ) AS d;
    IF findings IS NOT NULL THEN
        SELECT coalesce(array_agg(taken.tenant_id), '{}'), coalesce(array_agg(taken.event_type), '{}'),
            coalesce(array_agg(taken.hour), '{}'), coalesce(array_agg(taken.quantity), '{}')
        INTO v_tenant_ids, v_event_types, v_hours, v_quantities
        FROM (
            SELECT c.tenant_id, c.event_type, c.hour, c.total - coalesce(refused.quantity, 0) AS quantity
            FROM unnest(p_tenant_ids, p_event_types, p_hours, p_totals)
                WITH ORDINALITY AS c (tenant_id, event_type, hour, total, number)
            LEFT JOIN (
                SELECT i.cell, sum(i.quantity::numeric) AS quantity
                FROM unnest(p_request_numbers, p_cell_numbers, p_quantities) AS i (request, cell, quantity)
                WHERE i.request IN (
                    SELECT f.request
                    FROM jsonb_to_recordset(findings) AS f (request integer, kind text)
                    WHERE f.kind = 'REFUSED'
                )
                GROUP BY i.cell
            ) AS refused ON refused.cell = c.number
        ) AS taken
        WHERE taken.quantity > 0;
        SELECT array_agg(c)
        INTO v_claims
        FROM unnest(v_claims) AS c
        WHERE c.request NOT IN (
            SELECT f.request
            FROM jsonb_to_recordset(findings) AS f (request integer, kind text)
            WHERE f.kind = 'REFUSED'
        );
    END IF;

    -- Before the counters: where the id is known already, nothing has been taken yet.
    INSERT INTO quota.reservation (
        org_id, reservation_id, state, created_at, request_count, findings,
        tenant_ids, event_types, hours, quantities, claims
    )
    VALUES (
        p_org_id, p_reservation_id, 'OPEN', p_now, p_request_count, findings,
        v_tenant_ids, v_event_types, v_hours, v_quantities,
        CASE WHEN v_claims IS NOT NULL THEN ARRAY(SELECT c.reservation_id FROM unnest(v_claims) AS c) END
    )
    ON CONFLICT ON CONSTRAINT reservation_pkey DO NOTHING;
    IF NOT FOUND THEN
        SELECT r.state, r.request_count, r.findings
        INTO STRICT state, request_count, findings
        FROM quota.reservation AS r
        WHERE r.org_id = p_org_id AND r.reservation_id = p_reservation_id;
        RETURN;
    END IF;

    INSERT INTO quota.usage_hour AS u (org_id, tenant_id, event_type, hour, quantity)
    SELECT p_org_id, i.tenant_id, i.event_type, i.hour, i.quantity
    FROM unnest(v_tenant_ids, v_event_types, v_hours, v_quantities) AS i (tenant_id, event_type, hour, quantity)
    ORDER BY 2, 3, 4
    ON CONFLICT ON CONSTRAINT usage_hour_pkey DO UPDATE SET quantity = u.quantity + EXCLUDED.quantity;
    INSERT INTO quota.usage_day AS u (org_id, tenant_id, event_type, day, quantity)
    SELECT p_org_id, i.tenant_id, i.event_type, (i.hour AT TIME ZONE 'UTC')::date, sum(i.quantity)
    FROM unnest(v_tenant_ids, v_event_types, v_hours, v_quantities) AS i (tenant_id, event_type, hour, quantity)
    GROUP BY 2, 3, 4
    ORDER BY 2, 3, 4
    ON CONFLICT ON CONSTRAINT usage_day_pkey DO UPDATE SET quantity = u.quantity + EXCLUDED.quantity;
    IF v_claims IS NOT NULL THEN
        -- From here on until it is settled nothing grows, however it ends: were the hold to stay in its own
        -- hour, to be given back later, others could fill one of the two in between.
        FOREACH v_claim IN ARRAY v_claims LOOP
            CONTINUE WHEN NOT v_claim.moves;
            PERFORM quota.add_use(
                p_org_id, p_tenant_ids[v_claim.cell], p_event_types[v_claim.cell], v_claim.hour, -v_claim.held
            );
            PERFORM quota.add_use(
                p_org_id, p_tenant_ids[v_claim.cell], p_event_types[v_claim.cell], p_hours[v_claim.cell],
                v_claim.held - v_claim.credit
            );
        END LOOP;
        UPDATE quota.reservation AS h
        SET claimed_by = p_reservation_id,
            hours = ARRAY[CASE WHEN c.moves THEN p_hours[c.cell] ELSE c.hour END],
            quantities = ARRAY[c.held - c.credit]
        FROM unnest(v_claims) AS c
        WHERE h.org_id = p_org_id AND h.reservation_id = c.reservation_id;
    END IF;
    IF v_reaching IS NOT NULL THEN
        PERFORM quota.record_reached(
            p_org_id, p_now,
            array_agg(p_tenant_ids[r.cell]), array_agg(p_event_types[r.cell]), array_agg(p_hours[r.cell])
        )
        FROM unnest(v_reaching) AS r (cell);
    END IF;
END
$$;
COMMENT ON FUNCTION quota.reserve IS
    'Takes quota for what quota.decide admits of a group; its arguments, and those of quota.find_claims; one call, one '
    'commit. What admitted requests claim of holds passes over to this reservation. For an id that is known already '
    'nothing is taken, and state, request_count and findings are those of the first call.';

CREATE FUNCTION quota.add_use(
    p_org_id uuid, p_tenant_id text, p_event_type text, p_hour timestamptz, p_quantity numeric
)
RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    -- Not INSERT … DO UPDATE alone: its check refuses a negative quantity before it finds the row.
    INSERT INTO quota.usage_hour (org_id, tenant_id, event_type, hour, quantity)
    VALUES (p_org_id, p_tenant_id, p_event_type, p_hour, 0)
    ON CONFLICT ON CONSTRAINT usage_hour_pkey DO NOTHING;
    UPDATE quota.usage_hour AS u
    SET quantity = u.quantity + p_quantity
    WHERE u.org_id = p_org_id AND u.tenant_id = p_tenant_id AND u.event_type = p_event_type AND u.hour = p_hour;
    INSERT INTO quota.usage_day (org_id, tenant_id, event_type, day, quantity)
    VALUES (p_org_id, p_tenant_id, p_event_type, (p_hour AT TIME ZONE 'UTC')::date, 0)
    ON CONFLICT ON CONSTRAINT usage_day_pkey DO NOTHING;
    UPDATE quota.usage_day AS u
    SET quantity = u.quantity + p_quantity
    WHERE u.org_id = p_org_id AND u.tenant_id = p_tenant_id AND u.event_type = p_event_type
        AND u.day = (p_hour AT TIME ZONE 'UTC')::date;
END
$$;
COMMENT ON FUNCTION quota.add_use IS
    'Adds signed units to the counters of an hour and its day; the head must be locked. Fails on a check below zero.';

CREATE FUNCTION quota.settle(
    p_org_id uuid, p_now timestamptz, p_reservation_ids uuid[], p_outcomes text[],
    OUT contradicted uuid[], OUT unknown_committed uuid[]
)
RETURNS record
LANGUAGE plpgsql VOLATILE
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
AS $$
DECLARE
    v_tenant_ids   text[];
    v_event_types  text[];
    v_hours        timestamptz[];
    v_read         uuid[];
    v_known        uuid[];
    v_open         uuid[];
    v_given_back   uuid[];
    v_watched      uuid[];
    v_claiming     uuid[];
    -- Holds.
    v_consumed     uuid[] := '{}';
    v_unconsumed   uuid[] := '{}';
    v_item         record;
    v_unknown      integer;
    v_inserted     integer;
BEGIN
    -- Heads before reservations, as in quota.reserve. Which heads is read without a lock: the items
    -- of a reservation never change, and whether it is still open is asked again below. The holds that
    -- it claims are of the same heads.
    SELECT coalesce(array_agg(DISTINCT r.reservation_id), '{}')
    INTO v_read
    FROM unnest(p_reservation_ids, p_outcomes) AS s (reservation_id, outcome)
    JOIN quota.reservation AS r ON r.org_id = p_org_id AND r.reservation_id = s.reservation_id
    WHERE (s.outcome = 'ABORTED' OR r.watched OR r.claims IS NOT NULL) AND r.state = 'OPEN'
        AND r.reservation_id = ANY (p_reservation_ids);
    SELECT coalesce(array_agg(i.tenant_id), '{}'), coalesce(array_agg(i.event_type), '{}')
    INTO v_tenant_ids, v_event_types
    FROM quota.reservation AS r
    CROSS JOIN LATERAL unnest(r.tenant_ids, r.event_types) AS i (tenant_id, event_type)
    WHERE r.org_id = p_org_id AND r.reservation_id = ANY (v_read);
    PERFORM quota.lock_heads(p_org_id, v_tenant_ids, v_event_types);

    SELECT coalesce(array_agg(r.reservation_id), '{}'),
        coalesce(array_agg(r.reservation_id) FILTER (WHERE r.state = 'OPEN'), '{}')
    INTO v_known, v_open
    FROM (
        SELECT reservation.reservation_id, reservation.state
        FROM quota.reservation
        WHERE reservation.org_id = p_org_id AND reservation.reservation_id = ANY (p_reservation_ids)
        ORDER BY reservation.reservation_id
        FOR UPDATE
    ) AS r;
    SELECT
        coalesce(array_agg(s.reservation_id) FILTER (WHERE r.state = 'OPEN' AND s.outcome = 'ABORTED'), '{}'),
        coalesce(
            array_agg(s.reservation_id) FILTER (WHERE r.state = 'OPEN' AND s.outcome = 'COMMITTED' AND r.watched), '{}'
        ),
        coalesce(array_agg(s.reservation_id) FILTER (WHERE r.state = 'OPEN' AND r.claims IS NOT NULL), '{}'),
        coalesce(array_agg(s.reservation_id) FILTER (WHERE r.state NOT IN ('OPEN', s.outcome)), '{}'),
        coalesce(array_agg(s.reservation_id) FILTER (WHERE r.state IS NULL AND s.outcome = 'COMMITTED'), '{}'),
        count(*) FILTER (WHERE r.state IS NULL)
    INTO v_given_back, v_watched, v_claiming, contradicted, unknown_committed, v_unknown
    FROM unnest(p_reservation_ids, p_outcomes) AS s (reservation_id, outcome)
    LEFT JOIN quota.reservation AS r
        ON r.org_id = p_org_id AND r.reservation_id = s.reservation_id AND r.reservation_id = ANY (v_known);

    INSERT INTO quota.reservation (
        org_id, reservation_id, state, created_at, closed_at, request_count,
        tenant_ids, event_types, hours, quantities
    )
    SELECT p_org_id, s.reservation_id, s.outcome, p_now, p_now, 0, '{}', '{}', '{}', '{}'
    FROM unnest(p_reservation_ids, p_outcomes) AS s (reservation_id, outcome)
    WHERE s.reservation_id <> ALL (v_known)
    ORDER BY s.reservation_id
    ON CONFLICT ON CONSTRAINT reservation_pkey DO NOTHING;
    GET DIAGNOSTICS v_inserted = ROW_COUNT;
    -- A reserve committed between two of our statements, or had one watched, and the heads are not
    -- locked: all again.
    IF v_inserted < v_unknown OR NOT v_given_back || v_watched || v_claiming <@ v_read THEN
        RAISE EXCEPTION 'a reservation arrived or was watched while it was settled' USING ERRCODE = 'serialization_failure';
    END IF;

    IF v_claiming <> '{}' THEN
        SELECT coalesce(array_agg(h.reservation_id) FILTER (WHERE s.outcome = 'COMMITTED'), '{}'),
            coalesce(array_agg(h.reservation_id) FILTER (WHERE s.outcome = 'ABORTED'), '{}')
        INTO v_consumed, v_unconsumed
        FROM unnest(p_reservation_ids, p_outcomes) AS s (reservation_id, outcome)
        JOIN quota.reservation AS r ON r.org_id = p_org_id AND r.reservation_id = s.reservation_id
        CROSS JOIN LATERAL unnest(r.claims) AS h (reservation_id)
        WHERE r.reservation_id = ANY (v_claiming);
    END IF;
    FOR v_item IN
        SELECT i.tenant_id, i.event_type, i.hour, sum(i.quantity) AS quantity
        FROM (
            SELECT i.tenant_id, i.event_type, i.hour, -i.quantity AS quantity
            FROM quota.reservation AS r
            CROSS JOIN LATERAL unnest(r.tenant_ids, r.event_types, r.hours, r.quantities)
                AS i (tenant_id, event_type, hour, quantity)
            -- Of a consumed hold, what its event did not need.
            WHERE r.org_id = p_org_id AND r.reservation_id = ANY (v_given_back || v_consumed)
            UNION ALL
            SELECT h.tenant_ids[1], h.event_types[1], h.hours[1], h.held_quantity - h.quantities[1]
            FROM quota.reservation AS h
            WHERE h.org_id = p_org_id AND h.reservation_id = ANY (v_unconsumed)
        ) AS i
        GROUP BY i.tenant_id, i.event_type, i.hour
    LOOP
        PERFORM quota.add_use(p_org_id, v_item.tenant_id, v_item.event_type, v_item.hour, v_item.quantity);
    END LOOP;

    UPDATE quota.reservation AS r
    SET state = s.outcome, closed_at = p_now
    FROM unnest(p_reservation_ids, p_outcomes) AS s (reservation_id, outcome)
    WHERE r.org_id = p_org_id AND r.reservation_id = s.reservation_id AND r.reservation_id = ANY (v_open);
    IF v_claiming <> '{}' THEN
        UPDATE quota.reservation AS h
        SET state = 'CONSUMED', closed_at = p_now
        WHERE h.org_id = p_org_id AND h.reservation_id = ANY (v_consumed);
        UPDATE quota.reservation AS h
        SET claimed_by = NULL, quantities = ARRAY[h.held_quantity]
        WHERE h.org_id = p_org_id AND h.reservation_id = ANY (v_unconsumed);
    END IF;

    IF v_watched <> '{}' THEN
        SELECT array_agg(i.tenant_id), array_agg(i.event_type), array_agg(i.hour)
        INTO v_tenant_ids, v_event_types, v_hours
        FROM quota.reservation AS r
        CROSS JOIN LATERAL unnest(r.tenant_ids, r.event_types, r.hours) AS i (tenant_id, event_type, hour)
        WHERE r.org_id = p_org_id AND r.reservation_id = ANY (v_watched);
        PERFORM quota.record_reached(p_org_id, p_now, v_tenant_ids, v_event_types, v_hours);
    END IF;
END
$$;
COMMENT ON FUNCTION quota.settle IS
    'Closes reservations (distinct ids) as COMMITTED or ABORTED; what is aborted is given back, what is committed may '
    'reach a line. Holds that they claim are consumed, or held again. An id that is unknown gets a tombstone. Returns '
    'the ids that are closed with the other outcome, which are left as they '
    'are, and the unknown ids that were to be committed.';

CREATE FUNCTION quota.adjust(
    p_org_id uuid, p_now timestamptz, p_adjustment_ids uuid[],
    p_tenant_ids text[], p_event_types text[], p_hours timestamptz[], p_quantities numeric[]
)
RETURNS uuid[]
LANGUAGE plpgsql VOLATILE
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
AS $$
DECLARE
    v_refused  uuid[] := '{}';
BEGIN
    PERFORM quota.lock_heads(p_org_id, p_tenant_ids, p_event_types);
    FOR n IN 1 .. cardinality(p_adjustment_ids) LOOP
        PERFORM 1
        FROM quota.adjustment AS a
        WHERE a.org_id = p_org_id AND a.adjustment_id = p_adjustment_ids[n];
        CONTINUE WHEN FOUND;
        -- A day is the sum of its hours, so it stays at or above zero where they do.
        PERFORM 1
        FROM quota.period_use(p_org_id, p_tenant_ids[n], p_event_types[n], 'HOURLY', p_hours[n], NULL) AS used
        WHERE used.quantity + p_quantities[n] < 0;
        IF FOUND THEN
            v_refused := v_refused || p_adjustment_ids[n];
            CONTINUE;
        END IF;
        PERFORM quota.add_use(p_org_id, p_tenant_ids[n], p_event_types[n], p_hours[n], p_quantities[n]);
        INSERT INTO quota.adjustment (org_id, adjustment_id, tenant_id, event_type, hour, quantity, adjusted_at)
        VALUES (p_org_id, p_adjustment_ids[n], p_tenant_ids[n], p_event_types[n], p_hours[n], p_quantities[n], p_now);
    END LOOP;
    PERFORM quota.record_reached(p_org_id, p_now, p_tenant_ids, p_event_types, p_hours);
    RETURN v_refused;
END
$$;
COMMENT ON FUNCTION quota.adjust IS
    'Adds signed quantities to counters, each id once. Returns the ids that would have taken a counter below zero.';

REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA quota FROM PUBLIC;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA quota TO usameter_quota;
