"""The search for operating points."""
