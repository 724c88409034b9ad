-- Holds, which are public reservations: making them, and giving them back.
--
-- New functions only: old code does not call them.

CREATE FUNCTION quota.hold(
    p_org_id uuid, p_reservation_id uuid, p_public_id text, p_now timestamptz, p_expires_at timestamptz,
    p_tenant_id text, p_event_type text, p_hour timestamptz, p_quantity numeric
)
RETURNS jsonb
LANGUAGE plpgsql VOLATILE
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
AS $$
DECLARE
    v_findings  jsonb;
    v_reaching  integer[];
    v_refused   boolean;
BEGIN
    PERFORM quota.lock_heads(p_org_id, ARRAY[p_tenant_id], ARRAY[p_event_type]);
    -- A retry gets its answer also where the limit has no room for a second one.
    PERFORM 1
    FROM quota.reservation AS r
    WHERE r.org_id = p_org_id AND r.reservation_id = p_reservation_id;
    IF FOUND THEN
        RETURN NULL;
    END IF;
    SELECT d.findings, d.reaching
    INTO v_findings, v_reaching
    FROM quota.decide(
        p_org_id, p_now, ARRAY[p_tenant_id], ARRAY[p_event_type], ARRAY[p_hour], ARRAY[p_quantity],
        ARRAY[0], ARRAY[1], ARRAY[p_quantity::text]
    ) AS d;
    v_refused := coalesce(v_findings @> '[{"kind": "REFUSED"}]', false);
    IF NOT v_refused THEN
        INSERT INTO quota.reservation (
            org_id, reservation_id, state, created_at, request_count, findings,
            tenant_ids, event_types, hours, quantities, public_id, held_quantity, expires_at
        )
        VALUES (
            p_org_id, p_reservation_id, 'OPEN', p_now, 1, v_findings, ARRAY[p_tenant_id], ARRAY[p_event_type],
            ARRAY[p_hour], ARRAY[p_quantity], p_public_id, p_quantity, p_expires_at
        )
        ON CONFLICT ON CONSTRAINT reservation_pkey DO NOTHING;
        IF NOT FOUND THEN
            RETURN NULL;
        END IF;
        PERFORM quota.add_use(p_org_id, p_tenant_id, p_event_type, p_hour, p_quantity);
    END IF;
    -- Also where it is refused: it may be the first to meet a new default, which use has reached already.
    IF v_reaching IS NOT NULL THEN
        PERFORM quota.record_reached(p_org_id, p_now, ARRAY[p_tenant_id], ARRAY[p_event_type], ARRAY[p_hour]);
    END IF;
    RETURN CASE WHEN v_refused THEN v_findings END;
END
$$;
COMMENT ON FUNCTION quota.hold IS
    'Makes a hold, if quota.decide admits it and its id is not known. Returns what refuses it, as quota.decide says it; '
    'null: the id is known now, of this hold or of what was there before.';

CREATE FUNCTION quota.give_holds_back(
    p_org_id uuid, p_now timestamptz, p_reservation_ids uuid[], p_state text
)
RETURNS integer
LANGUAGE plpgsql VOLATILE
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
AS $$
DECLARE
    v_tenant_ids   text[];
    v_event_types  text[];
    v_hold         record;
    v_count        integer := 0;
BEGIN
    SELECT coalesce(array_agg(h.tenant_ids[1]), '{}'), coalesce(array_agg(h.event_types[1]), '{}')
    INTO v_tenant_ids, v_event_types
    FROM quota.reservation AS h
    WHERE h.org_id = p_org_id AND h.reservation_id = ANY (p_reservation_ids) AND h.state = 'OPEN';
    PERFORM quota.lock_heads(p_org_id, v_tenant_ids, v_event_types);
    FOR v_hold IN
        UPDATE quota.reservation AS h
        SET state = p_state, closed_at = p_now
        WHERE h.org_id = p_org_id AND h.reservation_id = ANY (p_reservation_ids)
            AND h.state = 'OPEN' AND h.claimed_by IS NULL
        RETURNING h.tenant_ids[1] AS tenant_id, h.event_types[1] AS event_type, h.hours[1] AS hour, h.held_quantity
    LOOP
        PERFORM quota.add_use(
            p_org_id, v_hold.tenant_id, v_hold.event_type, v_hold.hour, -v_hold.held_quantity
        );
        v_count := v_count + 1;
    END LOOP;
    RETURN v_count;
END
$$;
COMMENT ON FUNCTION quota.give_holds_back IS
    'Closes holds as EXPIRED or CANCELLED and gives back what they hold, but for those that are closed already or are '
    'claimed; how many that were.';

CREATE FUNCTION quota.cancel_hold(p_org_id uuid, p_reservation_id uuid, p_public_id text, p_now timestamptz)
RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    INSERT INTO quota.reservation (
        org_id, reservation_id, state, created_at, closed_at, request_count,
        tenant_ids, event_types, hours, quantities, public_id
    )
    VALUES (p_org_id, p_reservation_id, 'CANCELLED', p_now, p_now, 0, '{}', '{}', '{}', '{}', p_public_id)
    ON CONFLICT ON CONSTRAINT reservation_pkey DO NOTHING;
    IF NOT FOUND THEN
        PERFORM quota.give_holds_back(p_org_id, p_now, ARRAY[p_reservation_id], 'CANCELLED');
    END IF;
END
$$;
COMMENT ON FUNCTION quota.cancel_hold IS
    'Cancels a hold that is neither closed nor claimed. An id that is unknown gets a tombstone.';

REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA quota FROM PUBLIC;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA quota TO usameter_quota;
