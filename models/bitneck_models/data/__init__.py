"""Photographs, class maps, scenes, and the cached features of the frozen head."""
