"""The mixers by name: one file per paper, its equations as pure functions and one thin Flax module."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ssm.mixers.dss import DSS
from ssm.mixers.liquid_s4 import LiquidS4
from ssm.mixers.lru import LRU
from ssm.mixers.s4 import S4
from ssm.mixers.s4d import S4D
from ssm.mixers.s5 import S5
from ssm.naming import build, unknown

MIXERS = {"s4": S4, "dss": DSS, "s4d": S4D, "s5": S5, "lru": LRU, "liquid_s4": LiquidS4}


def mixer(name: str, width: int, options: Mapping[str, Any], /, **fixed: Any) -> nn.Module:
    """The mixer module of that name; options are its fields. Raises ValueError for an unknown name or option."""
    if name not in MIXERS:
        raise unknown("mixer", name, MIXERS)
    return build(name, MIXERS[name], options, width=width, **fixed)
