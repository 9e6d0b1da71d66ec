"""What edge and cloud tell each other: messages as plain values, and the frames among them with their CRC."""
