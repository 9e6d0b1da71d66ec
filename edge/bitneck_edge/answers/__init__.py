"""What came back for a photograph: checked, put together, written."""
