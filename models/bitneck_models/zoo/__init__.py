"""Zoo entries: recipes, and what was trained and measured of them."""
