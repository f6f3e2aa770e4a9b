"""The machine and the time of a measurement, as they stand in its JSON."""

from __future__ import annotations

import os
import platform
from datetime import date
from typing import Any


def machine() -> dict[str, Any]:
    """Called before the measurement, so that `load_before` is the load of others."""
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": date.today().isoformat(),
        "processor": names[0] if names else platform.machine(),
        "cpu_cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    }
