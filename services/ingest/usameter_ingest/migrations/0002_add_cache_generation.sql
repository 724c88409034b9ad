-- The generation of an organization's events: what a cache of them is kept under, so that what was
-- cached before is not met again where it may have become untrue. It changes when an event is voided, and
-- when the database's memory of commits may have gone back. Old code runs on it unchanged.

CREATE TABLE ingest.void_count (
    org_id  uuid    NOT NULL,
    voids   bigint  NOT NULL,
    CONSTRAINT void_count_pkey PRIMARY KEY (org_id),
    CONSTRAINT void_count_positive CHECK (voids > 0)
);
COMMENT ON TABLE ingest.void_count IS 'How many events of an organization were voided, counted in the transactions that void them.';

CREATE FUNCTION ingest.count_void() RETURNS trigger
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    INSERT INTO ingest.void_count AS counted (org_id, voids) VALUES (NEW.org_id, 1)
    ON CONFLICT ON CONSTRAINT void_count_pkey DO UPDATE SET voids = counted.voids + 1;
    RETURN NULL;
END
$$;
CREATE TRIGGER correction_counts_void AFTER INSERT ON ingest.correction
FOR EACH ROW WHEN (NEW.kind = 'VOID') EXECUTE FUNCTION ingest.count_void();

INSERT INTO ingest.void_count (org_id, voids)
SELECT org_id, count(*) FROM ingest.correction WHERE kind = 'VOID' GROUP BY org_id;

-- A server that runs forgets no commit. So its start tells apart whatever it was restored or promoted
-- from; the database and the table's file, what is restored while it runs. STABLE: it is of the same
-- snapshot as the events that a statement reads with it, or an older one than those that it writes.
CREATE FUNCTION ingest.cache_generation(p_org_id uuid) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT concat_ws('.',
        (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint,
        (SELECT oid FROM pg_database WHERE datname = current_database()),
        pg_relation_filenode('ingest.usage_event'),
        coalesce((SELECT voids FROM ingest.void_count WHERE org_id = p_org_id), 0))
$$;

GRANT SELECT, INSERT, UPDATE ON ingest.void_count TO usameter_ingest;
