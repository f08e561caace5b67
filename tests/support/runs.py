"""The record of a run, for tests that make the folder of a run themselves, and runs without plots."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm_tinyvit.train.record import RUN_RECORD, VERSION


def write_record(run: Path, flags: dict[str, Any] | None = None, launches: list[dict[str, Any]] | None = None) -> None:
    """Write a `run.json` with these flags and launches, or change those of the one that is there, decided by a store or
    not.
    """
    file = run / RUN_RECORD
    record = json.loads(file.read_text()) if file.exists() else {'version': VERSION, 'flags': {}}
    record['flags'] |= flags or {}
    record['decided'] = {name: (flags or {}).get(name, value) for name, value in record.get('decided', {}).items()}
    record.setdefault('launches', [{'epoch': 0, 'commit': None, 'environment': {}}])
    if launches is not None:
        record['launches'] = [{'commit': None, **launch} for launch in launches]
    file.write_text(json.dumps(record))


def leave_plots_out(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Have pages without plots, as where matplotlib is not installed: a third of the time of a small run."""
    for name in ('compare', 'plots', 'run', 'store'):
        patch(importlib.import_module(f'timm_tinyvit.report.{name}'), 'can_plot', lambda: False)
