"""Export of zoo entries as bundles, and the proof that a bundle equals its network."""

from bitneck.moved import names_of

__getattr__ = names_of(__name__)
