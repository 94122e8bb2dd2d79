"""Optimizers with momentum, which may be a variable of what is compiled: Keras's own takes a number alone."""

from typing import Any

import keras
from keras import ops

from jobs.training.optimizer import NOT_DECAYED

TRUST = 1e-3
"""Share of a layer's norm that a step may change it by (eta)."""


class Nesterov(keras.optimizers.Optimizer):
    """SGD with Nesterov's momentum (Sutskever et al. 2013, equations 3 and 4, in the form that Keras has)."""

    def __init__(self, learning_rate: Any, momentum: Any = 0.9, **settings: Any) -> None:
        super().__init__(learning_rate, name="nesterov", **settings)
        self._momentum = momentum

    def build(self, variables: list[keras.Variable]) -> None:
        """One momentum a variable."""
        if self.built:
            return
        super().build(variables)
        self._momentums = self.add_optimizer_variables(variables, "momentum")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Change a variable by its gradient."""
        change = ops.cast(learning_rate, variable.dtype) * gradient
        momentum = self._momentums[self._get_variable_index(variable)]
        self.assign(momentum, self._momentum * momentum - change)
        self.assign_add(variable, self._momentum * momentum - change)

    def get_config(self) -> dict[str, Any]:
        """What Keras makes one anew from."""
        return {**super().get_config(), "momentum": self._momentum}


class Lars(keras.optimizers.Optimizer):
    """LARS (You, Gitman, Ginsburg, 'Large Batch Training of Convolutional Networks', 2017).

    Momentum, with a rate of its own for each layer: TRUST * |w| / |g + decay * w| (equation 6).
    Biases and what normalisation learns are neither adapted nor decayed, as in SimCLR and Barlow Twins.
    """

    def __init__(self, learning_rate: Any, momentum: Any = 0.9, decay: Any = 0.0, **settings: Any) -> None:
        super().__init__(learning_rate, name="lars", **settings)
        self._momentum, self._decay = momentum, decay

    def build(self, variables: list[keras.Variable]) -> None:
        """One momentum a variable."""
        if self.built:
            return
        super().build(variables)
        # Biases of attention have two axes.
        matrices = [v for v in variables if len(v.shape) > 1 and not any(name in v.path for name in NOT_DECAYED)]
        self._adapted = {self._var_key(variable) for variable in matrices}
        self._momentums = self.add_optimizer_variables(variables, "momentum")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Change a variable by its gradient."""
        rate = ops.cast(learning_rate, variable.dtype)
        if self._var_key(variable) in self._adapted:
            gradient = gradient + self._decay * variable
            norms = [ops.sqrt(ops.sum(ops.square(values))) for values in (variable, gradient)]
            measurable = ops.logical_and(norms[0] > 0, norms[1] > 0)
            rate *= ops.where(measurable, TRUST * norms[0] / ops.where(measurable, norms[1], 1.0), 1.0)
        momentum = self._momentums[self._get_variable_index(variable)]
        self.assign(momentum, self._momentum * momentum + rate * gradient)
        self.assign_sub(variable, momentum)

    def get_config(self) -> dict[str, Any]:
        """What Keras makes one anew from."""
        return {**super().get_config(), "momentum": self._momentum, "decay": self._decay}
