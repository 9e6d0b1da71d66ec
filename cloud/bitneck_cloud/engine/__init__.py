"""From payloads to outputs: queue, batches along the chain, the served model."""

from bitneck.moved import names_of

__getattr__ = names_of(__name__)
