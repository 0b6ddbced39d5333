"""Whoever touches a weight of an offloaded module is seen, wherever it got the weight from.

Hooks see the modules that are called. They do not see a child that is called past its parent, a ``forward`` that is called
directly, a weight that another module reads, or a change through ``.data``. So weights get classes of their own while their
module is offloaded, which change nothing that they are (name, type checks, attributes, bytes) and see who touches them:

- *resting*: the parameters that a module owns while nothing runs. Torch asks such a class before every operation
  (``__torch_function__``). Inside a pass a read is answered with the weight on the device; outside, what may change the
  bytes is noted, and what would replace the memory is refused.
- *shown*: what owners have while their group is on the device. Only ``.data`` is special: what is written through it is
  found again, although torch does not count it. Operations cost what they cost on any parameter.
"""

from vramkit.offload.watch.at_rest import Keeper, data_at_rest, is_resting, released, resting
from vramkit.offload.watch.lost import refuse_lost
from vramkit.offload.watch.on_show import (
    data_of,
    forget_data,
    shown,
    stand_in,
    stands_for,
    with_data,
    written_through_data,
)

__all__ = [
    "Keeper",
    "data_at_rest",
    "data_of",
    "forget_data",
    "is_resting",
    "refuse_lost",
    "released",
    "resting",
    "shown",
    "stand_in",
    "stands_for",
    "with_data",
    "written_through_data",
]
