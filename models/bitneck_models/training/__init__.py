"""Training of units and of segmentation networks."""

from bitneck.moved import names_of

__getattr__ = names_of(__name__)
