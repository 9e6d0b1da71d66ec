"""Frozen task networks as chains of stages: recipes, weights, cuts, and their form as ONNX."""
