"""The quota service: limits, reservations, and what counts against them."""
