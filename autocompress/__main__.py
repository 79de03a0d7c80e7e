"""The process of the command line: ``autocompress``, or ``python -m autocompress``, which torchrun can start."""

import atexit
import contextlib
import os
import sys
import threading
from typing import NoReturn

from autocompress.cli import main


def run() -> NoReturn:
    """Runs the command line, and ends the process as soon as that is done.

    Python would first take apart, object by object, what the imported libraries hold: one to three seconds.
    """
    status = 0
    try:
        main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    if threading.active_count() > 1:  # what others still do, Python waits for
        sys.exit(status)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # whoever read it has gone
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    run()
