"""What an invoice is proven with: the ledger's bytes and the arithmetic of prices, without any I/O.

Services make what customers check; both go by these modules.
"""
