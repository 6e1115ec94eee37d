"""The mixers by name: one file per paper, its equations as pure functions and one thin Flax module."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ssm.mixers.attention import Attention
from ssm.mixers.dss import DSS
from ssm.mixers.gated_deltanet import GatedDeltaNet
from ssm.mixers.liquid_s4 import LiquidS4
from ssm.mixers.lru import LRU
from ssm.mixers.mamba import Mamba
from ssm.mixers.mamba2 import Mamba2
from ssm.mixers.mamba3 import Mamba3
from ssm.mixers.s4 import S4
from ssm.mixers.s4d import S4D
from ssm.mixers.s5 import S5
from ssm.naming import build, unknown

MIXERS = {
    "s4": S4,
    "dss": DSS,
    "s4d": S4D,
    "s5": S5,
    "lru": LRU,
    "liquid_s4": LiquidS4,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "gated_deltanet": GatedDeltaNet,
    "attention": Attention,
}


def mixer(name: str, width: int, options: Mapping[str, Any], /, **fixed: Any) -> nn.Module:
    """The mixer module of that name; options are its fields, `fixed` those that the caller decides.

    Raises ValueError for an unknown name or option, and for `bidirectional` where the mixer is causal only.
    """
    if name not in MIXERS:
        raise unknown("mixer", name, MIXERS)
    if "bidirectional" in fixed and not hasattr(MIXERS[name], "bidirectional"):
        raise ValueError(f"bidirectional is not for {name}, which is causal; leave it False")
    return build(name, MIXERS[name], options, width=width, **fixed)
