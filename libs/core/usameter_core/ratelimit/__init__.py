"""Rate limits: how many requests an API key may send in any second, minute and hour.

policy    what is limited: values, and their form in Redis
windows   the sliding windows: one algorithm, as a Lua script and in memory
mirror    the policies of all organizations in Redis, written by quota and read by everybody
standing  what the caller is told
limiter   decides for each request, with Redis or without
"""
