"""Zoo entries on disk: recipes, trained points, records."""
