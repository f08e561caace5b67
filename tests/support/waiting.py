"""Waiting for what another process does."""

import time
from collections.abc import Callable
from typing import Any


def wait_until(condition: Callable[[], Any], seconds: float = 120., alive: Callable[[], bool] = lambda: True) -> Any:
    """Wait until a condition is true, and return what it gave; fail after some seconds, or if nobody is alive."""
    end = time.monotonic() + seconds
    while True:
        is_over = time.monotonic() >= end or not alive()  # seen first: what they did at last counts
        if result := condition():
            return result
        assert not is_over
        time.sleep(0.01)
