"""What edge, cloud and models share: coding, bundles, messages, settings, photographs, the runtime, errors."""

import os

from bitneck import moved

__version__ = "0.1.0"

# ONNX Runtime 1.29 and later send usage data, unless this is set before its first import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# gRPC's own lines about failed connections say less than our errors, and come between them.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

moved.install()
