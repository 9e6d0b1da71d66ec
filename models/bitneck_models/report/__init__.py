"""What was measured, as tables and curves."""
