"""Optimizers whose learning rate differs by layer (Clark et al. 2020, ELECTRA; Bao et al. 2022, BEiT)."""

from collections.abc import Sequence
from typing import Any

import keras


def layerwise(
    kind: type[keras.optimizers.Optimizer], shares: Sequence[tuple[keras.Variable, float]]
) -> type[keras.optimizers.Optimizer]:
    """The optimizer class, each of whose variables takes its share of the learning rate, in its decay as well."""

    class Layerwise(kind):
        def build(self, variables: list[keras.Variable]) -> None:
            self._shares = {self._var_key(variable): share for variable, share in shares}
            super().build(variables)

        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            super().update_step(gradient, variable, learning_rate * self._shares[self._var_key(variable)])

        def _apply_weight_decay(self, variables: Any) -> None:
            for variable in variables if self.weight_decay else ():
                if self._use_weight_decay(variable):
                    rate = self.learning_rate * self._shares[self._var_key(variable)]
                    variable.assign(variable * (1 - rate * self.weight_decay))

    return Layerwise
