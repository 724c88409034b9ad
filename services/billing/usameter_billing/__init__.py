"""Billing: prices, billing periods and invoices that can be proven line by line."""
