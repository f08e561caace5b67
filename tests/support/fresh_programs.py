"""What is run by an interpreter that has imported nothing: `python fresh_programs.py FUNCTION [ARGUMENT...]`."""

import atexit
import os
import runpy
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ('torch', 'timm', 'datasets', 'huggingface_hub', 'transformers', 'pyarrow', 'numpy')


def run_light(module: str, *arguments: str) -> None:
    """Run a module as a program, and fail if anything heavy has been imported by its end."""

    def check() -> None:
        heavy = [name for name in HEAVY if name in sys.modules]
        if heavy:
            print('imported', *heavy, file=sys.stderr, flush=True)
            os._exit(99)

    atexit.register(check)
    # As Python has them while it looks for the module.
    sys.argv, sys.orig_argv = ['-m', *arguments], ['python', '-m', module, *arguments]
    runpy.run_module(module, run_name='__main__', alter_sys=True)


def run_code(code: str) -> None:
    """Run Python code, to which a warning is an error."""
    warnings.simplefilter('error', UserWarning)
    exec(code, {})


def help_from(site: str) -> None:
    """Print the help of the training script with what lies in a folder alone, and nothing of this tree."""
    sys.path[:] = [site, *(entry for entry in sys.path if entry not in ('', str(ROOT)))]
    sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]
    sys.argv[1:] = ['--config', 'demo', '--help']
    import timm_tinyvit
    assert timm_tinyvit.__file__.startswith(site), timm_tinyvit.__file__
    runpy.run_module('train_distill', run_name='__main__')


def print_lines() -> None:
    """Print more lines than anybody reads, the first when its reader may have left."""
    sys.argv = ['timm-tinyvit']  # so that importing the package imports no torch
    from timm_tinyvit.base.errors import reports_input_errors

    @reports_input_errors
    def main(argv: list[str]) -> None:
        time.sleep(0.5)
        for _ in range(100_000):
            print('a line', flush=True)

    main([])


def wait_for_a_signal() -> None:
    """Say what happens, for a minute."""
    sys.argv = ['timm-tinyvit']
    from timm_tinyvit.base.errors import reports_input_errors

    @reports_input_errors
    def main(argv: list[str]) -> None:
        try:
            print('begun', flush=True)
            # In short pieces: a signal that comes just before a sleep is handled after it.
            for _ in range(600):
                time.sleep(0.1)
        finally:
            print('in order', flush=True)

    main([])


class OneAndThenNone:
    """A data set whose first sample is there at once, and the others after a minute."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        time.sleep(60 * (index > 0))
        return index


def leave_a_busy_worker() -> None:
    """End while loader workers make samples."""
    from torch.utils.data import DataLoader

    from timm_tinyvit.base.launch import init_worker

    warnings.simplefilter('ignore')  # more workers than cores
    batches = iter(DataLoader(OneAndThenNone(), num_workers=4, worker_init_fn=init_worker))
    next(batches)
    print('leaving', flush=True)
    # As an error that a program ends by would, whose traceback holds the loader.
    sys.batches = batches


if __name__ == '__main__':
    globals()[sys.argv[1]](*sys.argv[2:])
