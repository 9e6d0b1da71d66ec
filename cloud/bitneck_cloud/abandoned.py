"""Threads that a stopping server leaves behind, because a disk does not answer them."""

import logging
import os
import sys

__all__ = ["abandon", "end_beside_abandoned"]

_left: list[str] = []


def abandon(what: str) -> None:
    """Wait for a thread no more.

    Args:
        what: it does.
    """
    _left.append(what)


def end_beside_abandoned() -> None:
    """End the process here, with the exit status 0, if a thread was abandoned.

    The interpreter's own end would wait for the thread, or abort if it is inside of ONNX Runtime.
    """
    if _left:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(0)
