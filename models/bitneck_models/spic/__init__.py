"""Checkpoints that the paper's authors published, as operating points of this system."""
