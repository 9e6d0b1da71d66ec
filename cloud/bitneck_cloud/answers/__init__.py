"""Answers for the cloud's side: their document, the hub that keeps the newest, and those who subscribe to them."""
