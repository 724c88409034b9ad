"""Invoices for people: what a document says, and the forms it comes in."""
