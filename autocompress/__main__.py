"""Entry point of the command line: ``autocompress``, or ``python -m autocompress``, which torchrun can start."""

import atexit
import contextlib
import os
import sys
import threading
from typing import NoReturn

from autocompress.cli import main


def run() -> NoReturn:
    """Runs the command line and exits without the interpreter's tear-down of all modules, which takes 1 to 3 s."""
    status = 0
    try:
        main()
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    if threading.active_count() > 1:  # a normal exit waits for the other threads
        sys.exit(status)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the reader of a pipe has closed it
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    run()
