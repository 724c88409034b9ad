"""What ingest does: recording, correcting, reading, sealing."""
