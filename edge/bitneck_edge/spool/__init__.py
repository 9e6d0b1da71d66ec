"""The spool: coded frames on the device's disk while no server answers, and their way to the cloud afterwards.

    format --bytes--> segment --> segments --> files: Spool     put, take, done; opens after any interruption
                                    |
                     writer --> DiskThread         in order; nobody on the event loop waits for the disk
                       |            |
    outage  frames without a link   `--> sender    a session of its own, behind the live frames

A `Spool` knows nothing of links; `Outage` and `Sender` know nothing of files.
"""
