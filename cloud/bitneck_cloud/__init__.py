"""The cloud half: frame to answer, batching, sessions, gRPC and HTTP."""

from bitneck import moved

moved.install()
