"""All SQL of the schema `ingest`."""
