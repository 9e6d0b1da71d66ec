"""Sessions and their streams."""
