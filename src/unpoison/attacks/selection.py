"""An attacker's choice of samples by a value of each, instead of a random draw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from unpoison.errors import ConfigError

RANDOM = "random"


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """``values`` of all samples of a set, in its order: the largest are taken; those that are no number, never.

    ``how``: the name of the rule, ``model``: the fingerprint of the attacker's model, as the manifest keeps them.
    """

    how: str
    model: str
    values: Float[np.ndarray, " n"]

    def best_first(self, eligible: Int[np.ndarray, " k"], size: int) -> Int[np.ndarray, " m"]:
        """``eligible`` rows of a set of ``size`` by falling value, ties in their order.

        Raises ConfigError for values of a set of another size.
        """
        if len(self.values) != size:
            raise ConfigError(
                f"the selection has {len(self.values)} values, the set {size} samples.",
                hint="Make it on this very set.",
            )
        usable = eligible[np.isfinite(self.values[eligible])]
        return usable[np.argsort(-self.values[usable], kind="stable")]
