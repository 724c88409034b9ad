"""Scopes, names and the values of identity; pure."""
