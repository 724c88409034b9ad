"""All SQL of the service, by resource. Functions take the connection: transactions belong to `service`."""
