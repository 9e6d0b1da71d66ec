"""The three commands. If an extra is missing, they say what to install.

An edge install has no web framework, and a server has no torch. But every install has all three commands.
"""

import importlib
import importlib.util
import sys
from typing import NoReturn

__all__ = ["cloud", "edge", "models"]


def edge() -> None:
    """Run ``bitneck-edge``."""
    _run("edge")


def cloud() -> None:
    """Run ``bitneck-cloud``."""
    _run("cloud")


def models() -> None:
    """Run ``bitneck-models``."""
    _run("models")


def _run(part: str) -> None:
    try:
        importlib.import_module(f"bitneck_{part}.cli").main()
    except KeyboardInterrupt:  # while modules are imported
        sys.exit(130)
    except ModuleNotFoundError as exc:
        module = (exc.name or "").partition(".")[0]
        if not module or module.startswith("bitneck") or importlib.util.find_spec(module) is not None:
            raise  # a mistake, here or in a package that is installed
        _refuse(part, module)


def _refuse(part: str, module: str) -> NoReturn:
    print(  # noqa: T201
        f"error: bitneck-{part} needs the Python module {module!r}, which is not installed; "
        f"install bitneck with its extra: pip install 'bitneck[{part}]', or '.[{part}]' in a checkout",
        file=sys.stderr,
    )
    sys.exit(2)
