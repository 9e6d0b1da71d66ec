"""Consumers of answers in the cloud, and what sends to them: a broker, a webhook's server, a process that commits."""
