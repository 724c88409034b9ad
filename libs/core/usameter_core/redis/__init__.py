"""Redis: a client behind a circuit breaker. It holds nothing that cannot be lost."""
