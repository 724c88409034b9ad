"""PostgreSQL: pool, transactions with retries, migrations."""
