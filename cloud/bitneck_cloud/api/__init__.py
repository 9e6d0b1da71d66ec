"""The rims: gRPC for devices, HTTP for operators."""
