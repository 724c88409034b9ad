"""gRPC: servers, channels, who is calling, and errors on the wire."""
