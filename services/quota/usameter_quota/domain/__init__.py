"""Values of the quota service, and what can be said of them without a database."""
