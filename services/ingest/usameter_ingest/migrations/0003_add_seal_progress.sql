-- How far the sealing of large epochs has come, for whoever waits for a job. A seal is one transaction, so what
-- it has done cannot be seen before it ends; this is written beside it, and deleted by it.
-- Old code runs on it unchanged.

CREATE TABLE ingest.seal_progress (
    org_id       uuid    NOT NULL,
    epoch        bigint  NOT NULL,
    entry_count  bigint  NOT NULL,
    CONSTRAINT seal_progress_pkey PRIMARY KEY (org_id, epoch)
);
COMMENT ON TABLE ingest.seal_progress IS 'Epochs that are being sealed for longer than seconds; begins anew where a seal does.';
COMMENT ON COLUMN ingest.seal_progress.entry_count IS 'Entries that are hashed.';

GRANT SELECT, INSERT, UPDATE, DELETE ON ingest.seal_progress TO usameter_ingest;
