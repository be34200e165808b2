"""llama.cpp's saved states (session and sequence files, state and sequence buffers).

`open_state` maps a file and reads its structure; rows are read from the map on demand.
`write_state` makes the same bytes again from any snapshot of such a state, or those that another
container, build or V layout wants. `layout` and `memory` say how a file is taken apart.
"""

from .layout import CONTAINERS
from .reader import open_state, parse_state
from .writer import state_size, write_state

__all__ = ["CONTAINERS", "open_state", "parse_state", "state_size", "write_state"]
