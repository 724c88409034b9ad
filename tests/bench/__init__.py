"""`make bench`: the numbers of docs/performance.md, measured on this machine.

harness           rows: runs, ceilings, bounds; the table and the JSON
machine           what they were measured on
platform          the running stack, organizations in it, and who used how much CPU
load, usage_data  the client, and what it sends
echo              the ceiling of single events: a service that does nothing
start, ingest, single, limits, quota, usage, sealing, billing_generation   the rows
"""
