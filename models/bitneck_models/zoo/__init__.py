"""Zoo entries on disk: recipes, trained points, records."""

from bitneck.moved import names_of

__getattr__ = names_of(__name__)
