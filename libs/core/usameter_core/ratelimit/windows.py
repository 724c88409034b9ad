"""Sliding windows: one algorithm, as a script that Redis runs as one step, and in memory for while Redis is away.

A window is a list of counts. A request joins the newest count if both lie in the same of `PARTS` parts
that time is cut into, and else begins a count of its own. A count is forgotten when its last request is
`window` old, so each request counts for at least the window, and for at most 1/PARTS of it longer:

- in no span of `window` are more than `requests` requests admitted, wherever it begins;
- a client may be refused up to 1/PARTS of the window early: 20 ms, 1.2 s, 72 s. One whose requests are further
  apart than that never is.

All windows of an API key are decided together: a request that does not fit into one counts in none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from usameter_core.ratelimit.policy import RateLimit

# Divides every window into whole microseconds.
PARTS = 50


@dataclass(frozen=True, slots=True)
class WindowState:
    """What is left of one limit after a decision."""

    limit: RateLimit
    remaining: int
    # Microseconds of the Unix time at which the next request is forgotten, and one more fits than now.
    frees_at_us: int


@dataclass(frozen=True, slots=True)
class Decision:
    """How many of some requests are admitted, at a moment in microseconds of the Unix time."""

    now_us: int
    admitted: int
    windows: tuple[WindowState, ...]


# Of an API key: times (of the last request) and counts in turn, oldest first, by the window's microseconds.
Counts = dict[int, list[int]]

# KEYS: the counts of an API key. ARGV: requests, parts, then the limit and the microseconds of each window.
# Answers the time, how many requests are admitted, then `remaining` and `frees_at_us` of each window.
SCRIPT = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local stored = redis.call('GET', KEYS[1])
local counts = stored and cmsgpack.unpack(stored) or {}
local requests, parts = tonumber(ARGV[1]), tonumber(ARGV[2])

local admitted, longest, kept, used = requests, 0, {}, {}
for i = 3, #ARGV, 2 do
    local name, limit, window = ARGV[i + 1], tonumber(ARGV[i]), tonumber(ARGV[i + 1])
    local all, young, sum = counts[name] or {}, {}, 0
    for j = 1, #all, 2 do
        if all[j] + window > now then
            young[#young + 1] = all[j]
            young[#young + 1] = all[j + 1]
            sum = sum + all[j + 1]
        end
    end
    kept[name], used[name] = young, sum
    admitted = math.max(0, math.min(admitted, limit - sum))
    longest = math.max(longest, window)
end

local answer = {now, admitted}
for i = 3, #ARGV, 2 do
    local name, limit, window = ARGV[i + 1], tonumber(ARGV[i]), tonumber(ARGV[i + 1])
    local young, sum, part = kept[name], used[name] + admitted, window / parts
    if admitted > 0 then
        local last = #young - 1
        if last > 0 and math.floor(young[last] / part) == math.floor(now / part) then
            young[last] = math.max(now, young[last])
            young[last + 1] = young[last + 1] + admitted
        else
            young[#young + 1] = now
            young[#young + 1] = admitted
        end
    end
    local left, frees_at, j = sum, now, 1
    while j < #young and left >= math.min(sum, limit) do
        left = left - young[j + 1]
        frees_at = young[j] + window
        j = j + 2
    end
    answer[#answer + 1] = math.max(0, limit - sum)
    answer[#answer + 1] = frees_at
end
if admitted > 0 then
    redis.call('SET', KEYS[1], cmsgpack.pack(kept), 'PX', math.ceil(longest / 1000))
end
return answer
"""


def script_arguments(limits: Sequence[RateLimit], requests: int) -> list[int]:
    """ARGV of `SCRIPT`."""
    arguments = [requests, PARTS]
    for limit in limits:
        arguments += (limit.requests, limit.window_us)
    return arguments


def decision_from_script(limits: Sequence[RateLimit], answer: Sequence[int]) -> Decision:
    """What `SCRIPT` answered."""
    windows = zip(limits, answer[2::2], answer[3::2], strict=True)
    return Decision(answer[0], answer[1], tuple(WindowState(*window) for window in windows))


def count_requests(counts: Counts, limits: Sequence[RateLimit], requests: int, *, now_us: int) -> Decision:
    """What `SCRIPT` does, on counts in memory, which it changes."""
    young = {limit.window_us: _young(counts.get(limit.window_us, []), limit.window_us, now_us) for limit in limits}
    admitted = requests
    for limit in limits:
        admitted = max(0, min(admitted, limit.requests - sum(young[limit.window_us][1::2])))
    if admitted:
        for window_us, window in young.items():
            _add(window, admitted, window_us=window_us, now_us=now_us)
        counts.clear()
        counts.update(young)
    return Decision(now_us, admitted, tuple(_state(limit, young[limit.window_us], now_us) for limit in limits))


def _young(window: list[int], window_us: int, now_us: int) -> list[int]:
    pairs = zip(window[::2], window[1::2], strict=True)
    return [number for pair in pairs if pair[0] + window_us > now_us for number in pair]


def _add(window: list[int], admitted: int, *, window_us: int, now_us: int) -> None:
    if window and window[-2] * PARTS // window_us == now_us * PARTS // window_us:
        window[-2] = max(now_us, window[-2])
        window[-1] += admitted
    else:
        window += (now_us, admitted)


def _state(limit: RateLimit, window: list[int], now_us: int) -> WindowState:
    used = left = sum(window[1::2])
    frees_at_us = now_us
    for at_us, count in zip(window[::2], window[1::2], strict=True):
        if left < min(used, limit.requests):
            break
        left -= count
        frees_at_us = at_us + limit.window_us
    return WindowState(limit, max(0, limit.requests - used), frees_at_us)
