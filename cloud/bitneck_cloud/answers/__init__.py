"""Answers for consumers in the cloud."""
