"""The `usameter` command: runs the platform on one machine, and works with it over REST.

main                                        the commands, and what becomes of an error
stack_commands, migrations                  up, down, status, migrate: through usameter_devstack
event_commands, usage_commands, invoice_commands    over REST
connection, api                             which server and key; requests, retries, refusals
importing/                                  from a file to batches of events
output, errors                              tables, JSON, and what can go wrong
"""
