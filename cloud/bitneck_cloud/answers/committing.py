"""From answers to the queue of all sinks: a publisher that commits their documents."""

from collections.abc import Sequence

from bitneck_cloud.answers.document import MapForm, Published, answer_document
from bitneck_cloud.answers.sinks.outgoing import Outgoing

__all__ = ["SinkPublisher"]


class SinkPublisher:
    """See `bitneck_cloud.answers.publishing.Publisher`.

    Args:
        outgoing: the sinks.
    """

    def __init__(self, outgoing: Outgoing) -> None:
        self._outgoing = outgoing
        self.waits = outgoing.sync
        self._form = MapForm.RUNS if outgoing.wants_maps else MapForm.NONE

    def commit(self, answers: Sequence[Published]) -> None:
        """Commit answers to the queue on disk; what the disk does not take is counted there."""
        self._outgoing.commit(
            [answer_document(answer, self._form) for answer in answers],
            [answer.answered.origin.caller or answer.client for answer in answers],
            lambda place, text: answers[place].keep_bare(text),  # subscribers get the same
        )
