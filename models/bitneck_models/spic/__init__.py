"""Checkpoints of the paper's authors as operating points."""
