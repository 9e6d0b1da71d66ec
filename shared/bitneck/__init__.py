"""What edge, cloud and models share: coding, bundles, messages, settings, photographs, the runtime, errors."""

from bitneck import moved

__version__ = "0.1.0"

moved.install()
