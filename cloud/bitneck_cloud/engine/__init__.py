"""From payloads to outputs: queue, batches along the chain, the served model."""
