"""The console: one static page of the server's own, and the routes that only it needs."""
