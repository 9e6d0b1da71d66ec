"""The device's temperatures, where Linux tells them."""

import re
from pathlib import Path

from bitneck.text import clean_text

__all__ = ["temperatures_c"]

_ZONES = Path("/sys/class/thermal")
_MOST_ZONES = 64
_POSSIBLE_C = -60.0, 200.0


def temperatures_c(zones: Path = _ZONES) -> dict[str, float]:
    """Degrees Celsius by the zone's type, such as ``cpu-thermal``; the hottest of zones with one type.

    Empty where there are none. A zone that is off, or says what cannot be, is left out.

    Args:
        zones: the folder of the thermal zones.
    """
    found: dict[str, float] = {}
    try:
        folders = sorted(folder for folder in zones.iterdir() if re.fullmatch(r"thermal_zone\d+", folder.name))
    except OSError:
        return {}
    for folder in folders[:_MOST_ZONES]:
        try:
            name = clean_text((folder / "type").read_text(errors="replace").strip(), 60)
            value = int((folder / "temp").read_text()) / 1000
        except (OSError, ValueError):
            continue
        if _POSSIBLE_C[0] <= value <= _POSSIBLE_C[1]:
            found[name] = max(value, found.get(name, value))
    return found
