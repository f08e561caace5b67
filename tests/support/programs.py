"""Programs run in this process, and what they say when they refuse something."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest


def refusal(main: Callable[[list[str]], None], argv: Sequence[Any], capsys: pytest.CaptureFixture) -> str:
    """The one sentence, on the last line of stderr, with which a program refuses these arguments or ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in argv])
    assert exit.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line for line in lines if line.startswith('error: ')] == lines[-1:]
    return lines[-1]
