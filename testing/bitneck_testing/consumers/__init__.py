"""Consumers of answers in the cloud, what sends to them, and who works with the control API.

A broker, a webhook's server, a process that commits; an operator, a browser.
"""
