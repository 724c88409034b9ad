"""What every service shares: values, errors, configuration, and the doors to the outside.

clock, ids, decimals, money, period      values; pure
errors                                   the one tree of errors
config, logging, metrics                 how a service is told what to be, and tells how it is
postgres, redis, grpc                    the only modules that open connections
pages                                    page tokens
"""
