"""Checkpoints that the paper's authors published, as operating points of this system."""

from bitneck.moved import names_of

__getattr__ = names_of(__name__)
