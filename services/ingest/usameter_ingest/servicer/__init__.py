"""The gRPC services of ingest: proto ↔ domain, nothing else."""
