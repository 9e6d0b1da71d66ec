"""Training of units, of conditional tables and of segmentation networks."""
