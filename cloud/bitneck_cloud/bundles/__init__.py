"""Bundles on the server's disks, which may vanish or not answer: their folders, what devices fetch, and their changes.

folder      whether a bundle is where it was loaded from
edge_files  the device's half of a bundle in use, for devices, whatever becomes of its folder
watching    folders of the bundles in use, looked at now and then: for the log, the metrics and the API
changes     one change of a model's bundle at a time, and none that waits for a disk for ever
"""
