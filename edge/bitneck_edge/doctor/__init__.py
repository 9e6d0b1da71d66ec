"""What may keep a device from working: its name service, route, TLS, token, clock, cache, bundle, camera."""
