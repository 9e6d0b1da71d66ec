"""The range coder of `constriction`, and the shortest payload that it can end with.

It writes words of 32 bits, but a payload may be shorter. Any number in the coder's last interval
``[low, low + range)`` decodes to the same symbols. The payload is the one with the most trailing zero bytes, and these
are not sent (measured: 3 bytes less a frame than whole words).
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import constriction
import numpy as np

from bitneck.errors import MalformedFrame, ModelFailure

__all__ = [
    "FAMILY",
    "check_length",
    "check_padding",
    "new_encoder",
    "range_coded",
    "range_decoder",
    "range_encoder",
    "shortest_payload",
]

_WORD_BYTES = 4
_STATE_WORDS = 2
"""constriction keeps two words of state behind the words that it has written."""

FAMILY = constriction.stream.model.Categorical(lazy=True, perfect=False)
"""Models that are given as a matrix of probabilities, one row for each symbol."""


def new_encoder() -> Any:
    """A range encoder, for symbols that their models have. Its `clear` would not reset it fully."""
    return constriction.stream.queue.RangeEncoder()


@contextlib.contextmanager
def range_encoder() -> Iterator[Any]:
    """The same, for symbols that are to be written.

    Raises:
        ModelFailure: it failed; its PanicException is a BaseException.
    """
    try:
        yield new_encoder()
    except BaseException as exc:
        if isinstance(exc, (KeyboardInterrupt, SystemExit)):
            raise
        raise ModelFailure(f"the range coder failed on checked symbols ({exc}); please report this") from exc


def range_coded(parts: Iterable[tuple[Any, ...]]) -> bytes:
    """The shortest payload of symbols, one part after the other.

    Args:
        parts: arguments of the encoder's `encode`: symbols that their models have, and the models.

    Raises:
        ModelFailure: see `range_encoder`.
    """
    with range_encoder() as encoder:
        for part in parts:
            encoder.encode(*part)
    return shortest_payload(encoder)


@contextlib.contextmanager
def range_decoder(payload: bytes) -> Iterator[Any]:
    """A range decoder at the beginning of a payload.

    Zeros replace the bytes that were left out, up to whole words and the decoder's state.

    Raises:
        MalformedFrame: it failed; see `range_encoder`.
    """
    padding = -len(payload) % _WORD_BYTES + _STATE_WORDS * _WORD_BYTES
    words = np.frombuffer(payload + bytes(padding), dtype=">u4").astype(np.uint32)
    try:
        yield constriction.stream.queue.RangeDecoder(words)
    except BaseException as exc:
        if isinstance(exc, (KeyboardInterrupt, SystemExit)):
            raise
        raise MalformedFrame(f"payload of {len(payload)} bytes is no range code ({exc})") from exc


def shortest_payload(encoder: Any) -> bytes:
    """The shortest byte string that, followed by zeros, lies in the encoder's last interval."""
    words_written, (low_state, interval) = encoder.pos()
    words = encoder.get_compressed()
    bits = 32 * (words_written + _STATE_WORDS)
    # `words`, read as one number, is some point of [low, low + interval); low is known modulo 2**64.
    point = int.from_bytes(words.astype(">u4").tobytes(), "big") << (bits - 32 * len(words))
    low: int = point - ((point - low_state) & 0xFFFF_FFFF_FFFF_FFFF)
    if low == 0:
        return b""
    last = low + interval - 1
    zeros = (
        (low - 1) ^ last
    ).bit_length() - 1  # some number of low .. last ends with so many zero bits, none with more
    shift: int = zeros // 8 * 8
    return (-(-low >> shift)).to_bytes((bits - shift) // 8, "big")  # low, rounded up


def check_length(payload: bytes, most: int) -> None:
    """Refuse what is longer than any payload of an operating point, before anything is decoded.

    Raises:
        MalformedFrame: it is.
    """
    if len(payload) > most:
        raise MalformedFrame(f"payload of {len(payload)} bytes, this operating point gives at most {most}")


def check_padding(payload: bytes, again: bytes) -> None:
    """Refuse a payload with bytes that no symbol accounts for.

    Args:
        payload: what was decoded.
        again: its symbols, encoded again.

    Raises:
        MalformedFrame: the payload is longer.
    """
    if len(again) < len(payload):
        raise MalformedFrame(
            f"payload of {len(payload)} bytes is longer than its symbols need; it was not made by this codec"
        )
