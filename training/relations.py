"""What "left of" means here: decided once, for the questions and for the vision tower's targets.

A shape is to the left of another if its centre is, by more than a quarter of both sizes together. It is *not* if its
centre is hardly further left. In between lies what one could argue about; there no question is asked.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Direction = Literal["left", "right", "above", "below"]
DIRECTIONS: tuple[Direction, ...] = ("left", "right", "above", "below")
# Share of the picture's longer side by which a centre may lie further out without lying "beside".
_LEVEL = 0.03
_CLEAR = 0.02


def _ahead(box: NDArray[np.float32], direction: Direction) -> NDArray[np.float32]:
    """How far shape j's centre lies from shape i's in this direction: [b, i, j]."""
    axis = 0 if direction in ("left", "right") else 1
    sign = -1 if direction in ("left", "above") else 1
    centre = box[..., axis] * sign
    return centre[:, None, :] - centre[:, :, None]


def _others(present: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return present[:, None, :] & present[:, :, None] & ~np.eye(present.shape[1], dtype=bool)


def beside(box: NDArray[np.float32], present: NDArray[np.bool_], direction: Direction) -> NDArray[np.bool_]:
    """Whether shape j lies further in this direction than shape i, however little it is beyond "level": [b, i, j]."""
    return (_ahead(box, direction) > _LEVEL) & _others(present)


def clearly_beside(box: NDArray[np.float32], present: NDArray[np.bool_], direction: Direction) -> NDArray[np.bool_]:
    """Whether shape j clearly lies in this direction from shape i: [b, i, j]."""
    reach = (box[:, None, :, 2] + box[:, :, None, 2]) / 2
    return (_ahead(box, direction) > np.maximum(reach / 2, _LEVEL) + _CLEAR) & _others(present)


def only_neighbour(box: NDArray[np.float32], present: NDArray[np.bool_], direction: Direction) -> NDArray[np.int64]:
    """The one shape that lies in this direction from shape i: [b, i].

    -1 where there is none, where there are several, and where it is not clear.
    """
    near, clear = beside(box, present, direction), clearly_beside(box, present, direction)
    return np.where((near.sum(axis=2) == 1) & clear.any(axis=2), clear.argmax(axis=2), -1)
