"""Photographs, class maps and the cached features of the frozen head."""
