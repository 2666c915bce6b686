"""FlexLoRA's resource types, and how its experiments spread them over clients, as data (arXiv 2402.11505).

Types have the paper's numbers; its code calls types 1, 2, 3 and 4 Type_0, Type_3, Type_2 and Type_1. Every type trains
all modules of attention and feed-forward, and only the LoRA ranks differ. The paper's figure 1 also has an "extreme
heavy tail" of ranks 1, 8 and 200, whose shares are not known: it is not here.
"""

from collections.abc import Mapping
from typing import NamedTuple

ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj", "o_proj")
"""Last names of attention's linear modules: OPT's and, with o_proj, Llama's."""
FEED_FORWARD = ("fc1", "fc2", "gate_proj", "up_proj", "down_proj")
"""Last names of the feed-forward's linear modules: two of OPT, three of Llama."""


class ResourceType(NamedTuple):
    """LoRA ranks of one kind of client: on attention, and on the feed-forward."""

    attention: int
    feed_forward: int


TYPES = (ResourceType(8, 8), ResourceType(30, 30), ResourceType(30, 200), ResourceType(200, 200))
"""Types 1 to 4."""

DISTRIBUTIONS: Mapping[str, tuple[float, float, float, float]] = {
    "homogeneous": (100, 0, 0, 0),
    "uniform": (25, 25, 25, 25),
    "heavy_tail_light": (80, 5, 5, 10),  # the code; its README says otherwise:
    "heavy_tail_light_readme": (85, 5, 5, 5),
    "normal": (5.75, 44.25, 44.25, 5.75),  # the paper's figure: most clients are of types 2 and 3
    "normal_code": (5.75, 5.75, 44.25, 44.25),  # the code takes a value for an index
    "heavy_tail_strong": (5, 5, 10, 80),  # the code; its README says otherwise:
    "heavy_tail_strong_readme": (5, 5, 5, 85),
}
"""Name -> share of clients of types 1 to 4, in percent. Those of normal are the density of N(1.5, 0.7) at 0 to 3."""
