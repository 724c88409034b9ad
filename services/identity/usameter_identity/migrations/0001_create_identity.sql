-- Organizations, their API keys, and their tenants.
--
-- Compatible with PostgreSQL 14. Every key leads with org_id, so that the schema can be sharded by
-- organization. Two look-ups cannot: a key's hash and an organization's name are what one finds the
-- organization by. Both have plain indexes; the hash of 256 random bits is unique by itself, and
-- names are kept unique by the one command that makes organizations, under a lock.

CREATE TABLE identity.organization (
    org_id      uuid        NOT NULL,
    name        text        NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT organization_pkey PRIMARY KEY (org_id),
    CONSTRAINT organization_name_length CHECK (char_length(name) BETWEEN 1 AND 100)
);
COMMENT ON TABLE identity.organization IS 'A company that runs its billing on Usameter.';
COMMENT ON COLUMN identity.organization.org_id IS 'UUIDv7.';
COMMENT ON COLUMN identity.organization.name IS 'Unique; 1 to 100 printable characters.';

CREATE INDEX organization_name_idx ON identity.organization (name);

CREATE TABLE identity.api_key (
    org_id      uuid        NOT NULL,
    api_key_id  uuid        NOT NULL,
    name        text        NOT NULL,
    prefix      text        NOT NULL,
    key_sha256  bytea       NOT NULL,
    scopes      text[]      NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    revoked_at  timestamptz,
    CONSTRAINT api_key_pkey PRIMARY KEY (org_id, api_key_id),
    CONSTRAINT api_key_organization_fkey FOREIGN KEY (org_id) REFERENCES identity.organization (org_id),
    CONSTRAINT api_key_name_length CHECK (char_length(name) BETWEEN 1 AND 100),
    CONSTRAINT api_key_prefix_length CHECK (char_length(prefix) BETWEEN 1 AND 12),
    CONSTRAINT api_key_sha256_length CHECK (octet_length(key_sha256) = 32),
    CONSTRAINT api_key_scopes_not_empty CHECK (cardinality(scopes) > 0)
);
COMMENT ON TABLE identity.api_key IS 'Who may call. The key itself is nowhere; a row is never deleted.';
COMMENT ON COLUMN identity.api_key.api_key_id IS 'UUIDv7: ascending by creation, which is the order of lists.';
COMMENT ON COLUMN identity.api_key.prefix IS 'First characters of the key, to recognise it by.';
COMMENT ON COLUMN identity.api_key.key_sha256 IS 'SHA-256 of the whole key, 32 bytes.';
COMMENT ON COLUMN identity.api_key.scopes IS 'What it may do, ascending; never changed.';
COMMENT ON COLUMN identity.api_key.revoked_at IS 'Refused from then on; null: in force.';

CREATE INDEX api_key_sha256_idx ON identity.api_key (key_sha256);

CREATE TABLE identity.tenant (
    org_id      uuid             NOT NULL,
    tenant_id   text COLLATE "C" NOT NULL,
    created_at  timestamptz      NOT NULL DEFAULT now(),
    CONSTRAINT tenant_pkey PRIMARY KEY (org_id, tenant_id),
    CONSTRAINT tenant_organization_fkey FOREIGN KEY (org_id) REFERENCES identity.organization (org_id),
    CONSTRAINT tenant_id_length CHECK (char_length(tenant_id) BETWEEN 1 AND 100)
);
COMMENT ON TABLE identity.tenant IS 'A customer of an organization; made by its first event, never removed.';
COMMENT ON COLUMN identity.tenant.tenant_id IS
    'The organization''s own name for it. Ordered by code point, in every database alike.';

GRANT SELECT, INSERT ON identity.organization TO usameter_identity;
GRANT SELECT, INSERT ON identity.tenant TO usameter_identity;
GRANT SELECT, INSERT ON identity.api_key TO usameter_identity;
GRANT UPDATE (revoked_at) ON identity.api_key TO usameter_identity;
