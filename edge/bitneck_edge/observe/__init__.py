"""What a device tells of itself: counts and times, its temperature, metrics for Prometheus, reports to the server."""
