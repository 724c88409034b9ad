"""How long to wait before a child that died is started again, and when to give up."""

from __future__ import annotations

import signal

from usameter_core.restarts import Deaths, RestartPolicy, exit_reason


def test_pauses_double_up_to_the_longest_and_then_there_are_none() -> None:
    deaths = Deaths(RestartPolicy(first_pause_seconds=1, pause_max_seconds=3, deaths_max=4))
    assert [deaths.add() for _ in range(5)] == [1, 2, 3, 3, None]
    assert len(deaths) == 5


def test_deaths_before_the_window_are_forgotten() -> None:
    deaths = Deaths(RestartPolicy(first_pause_seconds=1, deaths_max=1, window_seconds=0))
    assert [deaths.add() for _ in range(3)] == [1, 1, 1]


def test_a_signal_is_named() -> None:
    assert exit_reason(0) == "exited with code 0"
    assert exit_reason(-signal.SIGKILL) == "was killed by SIGKILL"
    assert exit_reason(-200) == "was killed by signal 200"
