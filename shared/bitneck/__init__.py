"""What edge, cloud and models share: symbols, tables, codec, bundle, ladder, image, runtime, errors, rpc stubs."""

__version__ = "0.1.0"
