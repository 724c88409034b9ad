"""Ingest: events, usage, epochs and snapshots. Owns the schema `ingest`; see services/ingest/README.md."""
