-- How many requests an API key may send in any second, minute and hour.
--
-- Adds a table; old code does not know it.

SET LOCAL lock_timeout = '5s';

CREATE TABLE quota.rate_limit (
    org_id               uuid        NOT NULL,
    api_key_id           text        NOT NULL,
    requests_per_second  integer,
    requests_per_minute  integer,
    requests_per_hour    integer,
    updated_at           timestamptz NOT NULL,
    CONSTRAINT rate_limit_pkey PRIMARY KEY (org_id, api_key_id),
    CONSTRAINT rate_limit_requests_per_second_check CHECK (requests_per_second > 0),
    CONSTRAINT rate_limit_requests_per_minute_check CHECK (requests_per_minute > 0),
    CONSTRAINT rate_limit_requests_per_hour_check CHECK (requests_per_hour > 0),
    CONSTRAINT rate_limit_default_limits_check CHECK (
        api_key_id <> '' OR num_nonnulls(requests_per_second, requests_per_minute, requests_per_hour) > 0
    )
);
COMMENT ON TABLE quota.rate_limit IS 'Policies in force; what services go by is their mirror in Redis.';
COMMENT ON COLUMN quota.rate_limit.api_key_id IS
    'Of identity; empty: the default of keys without a policy of their own.';
COMMENT ON COLUMN quota.rate_limit.requests_per_second IS 'In any span of a second, of each key; null: not limited.';
COMMENT ON COLUMN quota.rate_limit.requests_per_minute IS 'In any span of a minute, of each key; null: not limited.';
COMMENT ON COLUMN quota.rate_limit.requests_per_hour IS 'In any span of an hour, of each key; null: not limited.';

GRANT SELECT, INSERT, UPDATE, DELETE ON quota.rate_limit TO usameter_quota;
