"""All SQL of the quota service. What must be atomic is a function of the schema, one call each."""
