"""Optimizers whose learning rate differs by layer (Clark et al. 2020, ELECTRA; Bao et al. 2022, BEiT)."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf


def layerwise(
    kind: type[keras.optimizers.Optimizer], depths: Sequence[tuple[keras.Variable, int]], share: tf.Variable
) -> type[keras.optimizers.Optimizer]:
    """The optimizer class, each of whose variables takes share**depth of the learning rate, in its decay as well."""

    class Layerwise(kind):
        def build(self, variables: list[keras.Variable]) -> None:
            self._depths = {self._var_key(variable): depth for variable, depth in depths}
            super().build(variables)

        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            super().update_step(gradient, variable, self._own(learning_rate, variable))

        def _apply_weight_decay(self, variables: Any) -> None:
            for variable in () if self.weight_decay is None else variables:
                if self._use_weight_decay(variable):
                    variable.assign(variable * (1 - self._own(self.learning_rate, variable) * self.weight_decay))

        def _own(self, learning_rate: Any, variable: Any) -> tf.Tensor:
            return learning_rate * share ** self._depths[self._var_key(variable)]

    return Layerwise
