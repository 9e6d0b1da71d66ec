"""The queue of all sinks: a log of answers in one SQLite file, in which each sink has its place.

answers -> `file` (one row each) -> `tail`, or the file again -> a sender -> the sink's place moves on -> `sweep`
"""
