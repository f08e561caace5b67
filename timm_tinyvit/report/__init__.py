"""Reads what teacher and trainer left: statistics of stores and results of runs, as text, JSON or one HTML page.

Neither models nor GPUs are needed; pictures of views need the images.
"""

from .compare import compare_runs
from .run import write_run_report
from .store import describe_store, report_store

__all__ = ['compare_runs', 'describe_store', 'report_store', 'write_run_report']
