"""Whether the server takes new work."""

__all__ = ["Readiness"]


class Readiness:
    """Whether the server takes new work; the program sets it."""

    def __init__(self) -> None:
        self.ready = False
