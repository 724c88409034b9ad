"""Organizations, tenants and API keys: who is calling."""
