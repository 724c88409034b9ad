"""What a quantity costs and what a tenant owes: pure, without I/O and without a clock."""
