"""The cloud half: frame to answer, batching, sessions, gRPC and HTTP."""
