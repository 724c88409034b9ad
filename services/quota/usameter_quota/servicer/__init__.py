"""Quota's protos ↔ domain, and nothing else: one module a resource."""
