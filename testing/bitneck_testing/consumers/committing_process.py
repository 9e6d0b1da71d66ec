"""A process that commits answers to sinks: ``python -m bitneck_testing.consumers.committing_process CONFIG``.

It reads commands from its standard input, one a line, and writes one line of JSON for each:

    commit FIRST LAST SIZE      answers with these numbers, SIZE at a time
    state                       of every sink
"""

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

from bitneck_cloud.answers.sinks.outgoing import Outgoing
from bitneck_cloud.settings import CloudSettings
from bitneck_testing.consumers.documents import answers

__all__ = ["main"]


def main() -> None:
    """Run it."""
    logging.basicConfig(level="INFO")
    settings = CloudSettings.load({}, Path(sys.argv[1]))
    outgoing = Outgoing(settings.sinks, settings.sinks_queue, server="cloud-1", sync=settings.sinks_sync == "always")
    outgoing.start()
    sys.stdout.write(json.dumps({"last_number": outgoing.last_number()}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        said: object = None
        match line.split():
            case ["commit", first, last, size]:
                for begin in range(int(first), int(last) + 1, int(size)):
                    outgoing.commit(answers(begin, min(begin + int(size) - 1, int(last))))
                said = int(last)
            case ["state"]:
                said = [asdict(state) for state in outgoing.states()]
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()
    outgoing.close()


if __name__ == "__main__":
    main()
