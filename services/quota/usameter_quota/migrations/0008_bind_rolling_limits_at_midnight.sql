-- A rolling limit binds from its change on, also across a midnight.
--
-- A request that asked before midnight and was decided after a change that was asked for after it, because it
-- waited for the change's lock or its replica's clock is behind, found the window over before the limit was set, and
-- was let through whatever it took. Replaces quota.decide by itself but for that condition; old code calls it alike.

SET LOCAL lock_timeout = '5s';

CREATE OR REPLACE FUNCTION quota.decide(
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
                -- rolling window begins, is only counted. The rolling window is never over: one that
                -- was set after a midnight binds also who asked before it, and waited for the change.
                AND (p.ends_at > l.set_at OR l.period = 'ROLLING_30D')
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
