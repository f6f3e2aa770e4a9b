"""Benchmarks of speed and memory: `results/` has the measurements, and each module says how to repeat its own."""

import os
import secrets

# Ray reads them when it is first imported. A benchmark starts an application and may join its Ray as another job.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
