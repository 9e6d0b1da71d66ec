"""From a zoo entry to a bundle, with the proof that both are equal."""
