"""The search for operating points: Optuna over (S, Cr, lambda, Q), for few bytes and high agreement at once.

    space.toml --sample--> UnitRecipe --train a little--> hopeless? end : train on --> (bpp, agreement)
    front of all trials --pick_ladder--> operating points --adopt--> zoo entry

Paper, section 3.4 and Table 1. The trials are in an Optuna storage, so a search continues after an interruption, and
any number of workers can share it: SQLite for the processes of one machine, PostgreSQL or MySQL for several machines.
Both values are measured on the photographs put aside for validation, never on an evaluation set.
"""

from bitneck.moved import names_of

__getattr__ = names_of(__name__)
