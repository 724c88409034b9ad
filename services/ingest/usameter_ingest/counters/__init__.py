"""All that ingest keeps in Redis; nothing of it decides what is stored, and all of it can be lost."""
