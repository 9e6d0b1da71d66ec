"""Generated from proto/bitneck/v1; see `make stubs`."""
