"""The two terms of the loss: the rate term and the task term."""
