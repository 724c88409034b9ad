"""What quota does: one module a resource."""
