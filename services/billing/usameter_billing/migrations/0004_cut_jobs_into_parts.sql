-- Bulk runs in parts, which workers bill in parallel.
-- Compatibility: adds a table and a column. Older code begins and finishes runs as it did; one that was cut into
-- parts it leaves alone, since that has no lease that ends, and shows it without what the parts have done. What older
-- code leaves unfinished is cut from where it had come to, so there is nothing to backfill.
--
-- A part has no lease: whoever bills some of its tenants holds its row locked until that is committed or rolled back.

ALTER TABLE billing.job ADD COLUMN seller_name text;
COMMENT ON COLUMN billing.job.seller_name IS 'As it was when the run was cut into parts, for all its invoices; null before';
COMMENT ON COLUMN billing.job.done IS 'Tenants; those of its parts are added when the run ends';
COMMENT ON COLUMN billing.job.failures IS 'Attempts in a row to cut it into parts that failed';
COMMENT ON COLUMN billing.job.lease_id IS 'Of the worker that is to cut it into parts';
COMMENT ON COLUMN billing.job.lease_until IS 'Until then only the worker with lease_id is; infinity: it is cut';
COMMENT ON COLUMN billing.job.after_tenant IS
    'Written by older code only, which billed one batch after another: how far it had come. Goes with a later migration';

CREATE TABLE billing.job_part (
    org_id          uuid        NOT NULL,
    job_id          uuid        NOT NULL,
    part            integer     NOT NULL,
    after_tenant    text        COLLATE "C" NOT NULL,
    through_tenant  text        COLLATE "C",
    state           text        NOT NULL,
    done            bigint      NOT NULL,
    problems        text[]      NOT NULL,
    given_up        text[]      NOT NULL,
    failures        integer     NOT NULL,
    alone_tenant    text        COLLATE "C",
    attempt_after   timestamptz NOT NULL,
    CONSTRAINT job_part_pkey PRIMARY KEY (org_id, job_id, part),
    CONSTRAINT job_part_state_check CHECK (state IN ('open', 'done')),
    CONSTRAINT job_part_alone_tenant_check CHECK (alone_tenant IS NULL OR failures > 0)
);
CREATE INDEX job_part_open_idx ON billing.job_part (part, attempt_after) WHERE state = 'open';
COMMENT ON TABLE billing.job_part IS 'Tenants of a running job; deleted when it ends';
COMMENT ON COLUMN billing.job_part.part IS 'From 1, ascending by tenant';
COMMENT ON COLUMN billing.job_part.after_tenant IS
    'Exclusive: the last tenant that is done; advances in the transaction that bills it, or gives it up';
COMMENT ON COLUMN billing.job_part.through_tenant IS 'Inclusive; null: the last part, of all that follow';
COMMENT ON COLUMN billing.job_part.done IS 'Tenants, without those that were given up';
COMMENT ON COLUMN billing.job_part.problems IS 'What could not be billed of tenants that are done, by tenant';
COMMENT ON COLUMN billing.job_part.given_up IS 'Tenants that are not billed, by tenant, each with the reason';
COMMENT ON COLUMN billing.job_part.failures IS
    'Attempts in a row that failed: each halves the next batch. After a giving up, as many as bring it down to one tenant';
COMMENT ON COLUMN billing.job_part.alone_tenant IS
    'Whom the last of them held alone; null: it held others as well, or none failed since a success or a giving up';

GRANT SELECT, INSERT, UPDATE, DELETE ON billing.job_part TO usameter_billing;
