"""The worker's process: python -m bitneck_cloud.answers.sinks.worker.main SOCKET...

It ends with its standard input, at once and without a goodbye: then the server has ended, and the next one may send the
same answers already. All else is imported after that is sure.
"""

import os
import signal
import sys
import threading

__all__ = ["main"]

_NICENESS = 5


def main() -> None:
    """Serve the sinks of these sockets until standard input ends."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the server gets them too, and ends this
        signal.signal(each, signal.SIG_IGN)
    life, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # so that a sink whose file is /dev/stdin does not read it
    os.close(nothing)
    threading.Thread(target=_end_with, args=(life,), daemon=True).start()
    os.nice(_NICENESS)

    from bitneck_cloud.answers.sinks.worker.serving import serve

    serve([int(number) for number in sys.argv[1:]])


def _end_with(pipe: int) -> None:
    os.read(pipe, 1)
    os._exit(0)


if __name__ == "__main__":
    main()
