"""The edge's half of a bundle: fetched from the server, kept in the cache."""
