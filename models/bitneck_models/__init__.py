"""Backbones, bottleneck units, rate estimators, training, evaluation and export. The only component with torch."""
