"""Run a command, and kill it with all that it has started when standard input ends: `python child.py COMMAND...`.

The parent holds the other end of standard input, which the system closes when the parent ends for any reason. This script is
started in its own session; nvcc starts further compilers, which are killed with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def _kill_at_end() -> None:
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    if os.getpgid(0) != os.getpid():
        sys.exit("child.py kills its process group, and was not started in one of its own")
    try:
        child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    except OSError as error:
        sys.exit(str(error))
    threading.Thread(target=_kill_at_end, daemon=True).start()
    status = child.wait()
    sys.exit(status if status >= 0 else 128 - status)
