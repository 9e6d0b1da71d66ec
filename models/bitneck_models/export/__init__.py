"""Export of zoo entries as bundles, and the proof that a bundle equals its network."""
