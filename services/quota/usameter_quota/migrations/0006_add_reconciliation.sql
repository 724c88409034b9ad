-- Repairs of counters that were found to differ from entries + unconsumed reservations.
--
-- Adds a table; old code does not know it. Changes the collation of the counters' keys to "C", that
-- of ingest's rollups: both are read side by side in the order of their keys. The indexes are built
-- anew under the tables' locks; comparisons in old code mean the same.

SET LOCAL lock_timeout = '5s';

ALTER TABLE quota.usage_hour
    ALTER COLUMN tenant_id TYPE text COLLATE "C",
    ALTER COLUMN event_type TYPE text COLLATE "C";
ALTER TABLE quota.usage_day
    ALTER COLUMN tenant_id TYPE text COLLATE "C",
    ALTER COLUMN event_type TYPE text COLLATE "C";

CREATE TABLE quota.repair (
    org_id       uuid        NOT NULL,
    repair_id    uuid        NOT NULL,
    repaired_at  timestamptz NOT NULL,
    repaired_by  text        NOT NULL,
    tenant_id    text        NOT NULL,
    event_type   text        NOT NULL,
    unit         text        NOT NULL,
    starts_at    timestamptz NOT NULL,
    counter      numeric     NOT NULL,
    entries      numeric     NOT NULL,
    reserved     numeric     NOT NULL,
    expected     numeric     NOT NULL,
    CONSTRAINT repair_pkey PRIMARY KEY (org_id, repair_id),
    CONSTRAINT repair_unit_check CHECK (unit IN ('HOUR', 'DAY')),
    CONSTRAINT repair_changes_something_check CHECK (counter <> expected)
);
COMMENT ON TABLE quota.repair IS 'Every repair of a counter, for ever: what it was, and why it is what it is since.';
COMMENT ON COLUMN quota.repair.repaired_by IS 'Id of the API key that asked for it.';
COMMENT ON COLUMN quota.repair.starts_at IS 'Of the UTC hour or day that the counter is of.';
COMMENT ON COLUMN quota.repair.counter IS 'What it was, in units.';
COMMENT ON COLUMN quota.repair.entries IS 'What was stored, in units.';
COMMENT ON COLUMN quota.repair.reserved IS 'What open reservations held whose entries were not stored, in units.';
COMMENT ON COLUMN quota.repair.expected IS
    'What it was set to, in units: both, and what corrections had given back that was not taken off yet.';

GRANT SELECT, INSERT ON quota.repair TO usameter_quota;
