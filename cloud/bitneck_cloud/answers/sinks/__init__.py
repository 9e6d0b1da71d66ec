"""Sinks: where answers go in the cloud. A queue on disk, and one sender for each sink that takes from it in order.

documents -> filters -> queue (SQLite) -> sender -> JSON Lines | (worker process) -> MQTT | webhook
"""
