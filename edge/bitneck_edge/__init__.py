"""The edge half: photograph to frame, the link to the cloud, and the command line of a device."""
