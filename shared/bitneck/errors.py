"""Every error that bitneck raises on purpose, each with its gRPC status, HTTP status and exit code.

    BitneckError                    INTERNAL             500  1
    |-- CallerError                 INVALID_ARGUMENT     400  2   the caller's own mistake
    |   |-- InvalidConfig           INVALID_ARGUMENT     400  2   a setting, recipe or argument is refused
    |   |-- ImageError              INVALID_ARGUMENT     400  2   no such photograph, or it cannot be read
    |   |-- UnknownModel            NOT_FOUND            404  2
    |   |-- UnknownPoint            NOT_FOUND            404  2
    |   |-- UnknownSession          NOT_FOUND            404  2
    |   |-- UnknownFile             NOT_FOUND            404  2   not a file that this bundle hands out
    |   |-- UnknownRule             NOT_FOUND            404  2   no rule of rates has these patterns
    |   |-- UnknownCandidate        NOT_FOUND            404  2   no bundle of this name among the candidates
    |   |-- CanaryRefused           FAILED_PRECONDITION  409  2   not now, or not with this bundle
    |   |-- FixedByFile             FAILED_PRECONDITION  409  2   the config file decides this, not the control API
    |   |-- RateUnreachable         FAILED_PRECONDITION  409  2   no operating point fits the rate asked for
    |   |-- Unauthenticated         UNAUTHENTICATED      401  2   no credential, or not the right one
    |   `-- PermissionDenied        PERMISSION_DENIED    403  2   a right credential, which does not allow this
    |-- BundleError                 INTERNAL             500  1   a bundle on this machine cannot be used
    |   |-- BundleCorrupt           DATA_LOSS            500  1   wrong digest, truncated, unreadable
    |   `-- BundleMismatch          FAILED_PRECONDITION  409  1   the peer runs another bundle
    |-- PeerError                   INVALID_ARGUMENT     400  1   what the other machine sent is refused
    |   |-- MalformedFrame          INVALID_ARGUMENT     400  1   wrong length, wrong order, impossible content
    |   |-- CorruptPayload          DATA_LOSS            400  1   the CRC does not match: damaged on the way
    |   |-- ProtocolError           FAILED_PRECONDITION  409  1   a message that is illegal at this moment
    |   `-- ReferenceUnknown        ABORTED              409  1   send the frame again, coded by itself
    |-- Overloaded                  RESOURCE_EXHAUSTED   429  1   a limit is reached: slow down, or try later
    |-- DeadlineExceeded            DEADLINE_EXCEEDED    504  1
    |-- Unavailable                 UNAVAILABLE          503  1   no server, or it is going away
    |   `-- Unreachable             UNAVAILABLE          503  2   one side wants TLS, or refuses a certificate
    |-- StateUnusable               INTERNAL             500  1   a file or folder that the server writes cannot be used
    `-- ModelFailure                INTERNAL             500  1   ONNX Runtime failed, or gave impossible numbers

A message says what happened, what was received and what was expected, where, and what to do. Foreign exceptions are
wrapped once, where they arise, with ``raise ... from exc``.
"""

from typing import ClassVar

__all__ = [
    "GRPC_CODES",
    "BitneckError",
    "BundleCorrupt",
    "BundleError",
    "BundleMismatch",
    "CallerError",
    "CanaryRefused",
    "CorruptPayload",
    "DeadlineExceeded",
    "FixedByFile",
    "ImageError",
    "InvalidConfig",
    "MalformedFrame",
    "ModelFailure",
    "Overloaded",
    "PeerError",
    "PermissionDenied",
    "ProtocolError",
    "RateUnreachable",
    "ReferenceUnknown",
    "StateUnusable",
    "Unauthenticated",
    "Unavailable",
    "UnknownCandidate",
    "UnknownFile",
    "UnknownModel",
    "UnknownPoint",
    "UnknownRule",
    "UnknownSession",
    "Unreachable",
    "error_from_status",
]

GRPC_CODES: dict[str, int] = {
    "OK": 0,
    "CANCELLED": 1,
    "UNKNOWN": 2,
    "INVALID_ARGUMENT": 3,
    "DEADLINE_EXCEEDED": 4,
    "NOT_FOUND": 5,
    "ALREADY_EXISTS": 6,
    "PERMISSION_DENIED": 7,
    "RESOURCE_EXHAUSTED": 8,
    "FAILED_PRECONDITION": 9,
    "ABORTED": 10,
    "OUT_OF_RANGE": 11,
    "UNIMPLEMENTED": 12,
    "INTERNAL": 13,
    "UNAVAILABLE": 14,
    "DATA_LOSS": 15,
    "UNAUTHENTICATED": 16,
}
"""gRPC status names and their numbers, as ``google.rpc.Code`` has them."""


class BitneckError(Exception):
    """Root of the tree; catch it to catch everything that bitneck raises on purpose."""

    grpc_status: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1
    transient: ClassVar[bool] = False
    """Whether the same call may succeed a little later, without a change on either side."""

    @property
    def grpc_code(self) -> int:
        """The number of `grpc_status`, for a ``Fault``."""
        return GRPC_CODES[self.grpc_status]


class CallerError(BitneckError):
    """The caller's own mistake: it will fail again until the call is changed."""

    grpc_status = "INVALID_ARGUMENT"
    http_status = 400
    exit_code = 2


class InvalidConfig(CallerError):
    """A setting, a recipe or an argument is refused."""


class ImageError(CallerError):
    """A photograph does not exist, is no image, is cut short, or is too large."""


class UnknownModel(CallerError):
    """No model of this name is served."""

    grpc_status = "NOT_FOUND"
    http_status = 404


class UnknownPoint(CallerError):
    """The bundle has no operating point of this id."""

    grpc_status = "NOT_FOUND"
    http_status = 404


class UnknownSession(CallerError):
    """No session of this id is open."""

    grpc_status = "NOT_FOUND"
    http_status = 404


class UnknownFile(CallerError):
    """The bundle has no such file, or does not hand it to an edge."""

    grpc_status = "NOT_FOUND"
    http_status = 404


class UnknownRule(CallerError):
    """No rule of rates has these patterns."""

    grpc_status = "NOT_FOUND"
    http_status = 404


class UnknownCandidate(CallerError):
    """The server's folder of candidates has no bundle of this name."""

    grpc_status = "NOT_FOUND"
    http_status = 404


class CanaryRefused(CallerError):
    """A canary cannot begin, or end, as things are; or not with this bundle."""

    grpc_status = "FAILED_PRECONDITION"
    http_status = 409


class FixedByFile(CallerError):
    """The config file decides this, so a change over the control API would be lost."""

    grpc_status = "FAILED_PRECONDITION"
    http_status = 409


class RateUnreachable(CallerError):
    """No operating point of the ladder fits the rate that was asked for."""

    grpc_status = "FAILED_PRECONDITION"
    http_status = 409


class Unauthenticated(CallerError):
    """The server asks for a credential, and none or a wrong one was given."""

    grpc_status = "UNAUTHENTICATED"
    http_status = 401


class PermissionDenied(CallerError):
    """The credential is right, and does not allow this."""

    grpc_status = "PERMISSION_DENIED"
    http_status = 403


class BundleError(BitneckError):
    """A bundle cannot be used."""


class BundleCorrupt(BundleError):
    """A bundle's file is missing, cut short, altered or unreadable."""

    grpc_status = "DATA_LOSS"


class BundleMismatch(BundleError):
    """The two machines do not run the same bundle."""

    grpc_status = "FAILED_PRECONDITION"
    http_status = 409


class PeerError(BitneckError):
    """What the other machine sent is refused."""

    grpc_status = "INVALID_ARGUMENT"
    http_status = 400


class MalformedFrame(PeerError):
    """A frame of wrong length, wrong order or impossible content."""


class CorruptPayload(PeerError):
    """A frame's CRC does not match its payload."""

    grpc_status = "DATA_LOSS"


class ProtocolError(PeerError):
    """A message that is illegal at this moment of the conversation."""

    grpc_status = "FAILED_PRECONDITION"
    http_status = 409


class ReferenceUnknown(PeerError):
    """A frame is coded against a frame whose symbols are not kept here. No other class has this gRPC status."""

    grpc_status = "ABORTED"
    http_status = 409


class Overloaded(BitneckError):
    """A limit is reached: frames in flight, sessions, or the queue."""

    grpc_status = "RESOURCE_EXHAUSTED"
    http_status = 429
    transient = True


class DeadlineExceeded(BitneckError):
    """The frame's deadline passed before its answer was there."""

    grpc_status = "DEADLINE_EXCEEDED"
    http_status = 504
    transient = True


class Unavailable(BitneckError):
    """No server answers, or it is going away."""

    grpc_status = "UNAVAILABLE"
    http_status = 503
    transient = True


class Unreachable(Unavailable):
    """There is no connection, and another attempt gives none: one side wants TLS, or refuses a certificate."""

    exit_code = 2
    transient = False


class StateUnusable(BitneckError):
    """What the server writes (state, sinks, earlier bundles) is damaged, another program's, or cannot be written."""


class ModelFailure(BitneckError):
    """ONNX Runtime could not load or run a file, or its result is not finite."""


_BY_STATUS: dict[str, type[BitneckError]] = {
    "INVALID_ARGUMENT": MalformedFrame,
    "NOT_FOUND": UnknownPoint,
    "FAILED_PRECONDITION": BundleMismatch,
    "DATA_LOSS": CorruptPayload,
    "ABORTED": ReferenceUnknown,
    "RESOURCE_EXHAUSTED": Overloaded,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "UNAVAILABLE": Unavailable,
    "UNAUTHENTICATED": Unauthenticated,
}


def error_from_status(code: int, message: str) -> BitneckError:
    """The error that best stands for a status received from the other machine.

    Args:
        code: a gRPC status code, as in ``Fault.code``; unknown numbers give a plain `BitneckError`.
        message: the peer's text.
    """
    name = next((name for name, number in GRPC_CODES.items() if number == code), "UNKNOWN")
    return _BY_STATUS.get(name, BitneckError)(f"{message} [{name} from the server]")
