"""The event loop of a `Recorder`, which must still work while the interpreter exits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import Any


class RecorderLoop(asyncio.SelectorEventLoop):
    """A loop that makes blocking calls, such as to look up a host name, in one thread of its own, a daemon.

    asyncio's executor takes no calls once the interpreter exits, which is when a recorder that was not
    closed delivers; nor can a thread be started then. So this one is there from the start.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        threading.Thread(target=self._serve, name="usameter-recorder-calls", daemon=True).start()

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """As every loop's; None is the thread of this loop."""
        if executor is not None:
            return super().run_in_executor(executor, func, *args)
        future: Future[Any] = Future()
        self._calls.put((future, lambda: func(*args)))
        return asyncio.wrap_future(future, loop=self)

    def close(self) -> None:
        """Close the loop; its thread ends after the call that it is in, which nobody waits for."""
        self._calls.put(None)
        super().close()

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            future, work = call
            # Whoever asked may have gone meanwhile: a look-up has no deadline, its connection has.
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
