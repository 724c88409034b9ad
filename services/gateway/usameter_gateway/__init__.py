"""The REST edge: transcodes /api to gRPC from the descriptor set, and knows no business rule."""
