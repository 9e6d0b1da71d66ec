"""The sink for MQTT brokers: one connection at a time, and what may be sent on it."""
