"""Generated from proto/bitneck/v2; see `make stubs`."""
