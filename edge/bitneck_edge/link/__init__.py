"""The stream to the cloud: frames out, answers in, across reconnects."""
