"""The interface by which a training run and its evaluation treat whatever is trained."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Generic, TypeVar

from jaxtyping import Array, Float

from spa_jax.data.encoding import Example
from spa_jax.models.llama import Llama, Params
from spa_jax.models.method import Method
from spa_jax.training.config import TapCacheConfig
from spa_jax.training.outcomes import Outcomes, Sums
from spa_jax.training.sources import Source
from spa_jax.weights.backbone import Backbone
from spa_jax.weights.plugin import Trained

TrainingBatch = TypeVar("TrainingBatch")
ScoringBatch = TypeVar("ScoringBatch")


@dataclasses.dataclass(frozen=True)
class Recipe(abc.ABC, Generic[TrainingBatch, ScoringBatch]):
    """How a method is trained and measured; hashable, so that steps compile for it.

    Batches are pytrees of arrays with the B rows first, as the recipe's two sources collate them.

    Attributes:
        method: what is trained.
    """

    method: Method

    @abc.abstractmethod
    def model(self, backbone: Backbone) -> Llama:
        """Returns the backbone's program, with the taps or the rematerialisation that the method needs."""

    @abc.abstractmethod
    def init_params(self, backbone: Backbone) -> Params:
        """Returns fresh trainable parameters: those of the method, and of what is trained beside it."""

    def method_params(self, params: Params) -> Params:
        """Returns those of the trained parameters that belong to the method."""
        return params

    @abc.abstractmethod
    def sources(
        self, backbone: Backbone, model: Llama, options: TapCacheConfig, batch_size: int, examples: Sequence[Example]
    ) -> tuple[Source, Source]:
        """Opens the sources of training batches and of batches to measure; nothing is computed yet.

        Raises:
            UserError: there is no room for what would be kept of the examples.
        """

    @abc.abstractmethod
    def loss(self, model: Llama, params: Params, frozen: Params, batch: TrainingBatch) -> tuple[Float[Array, ""], Sums]:
        """Sums the objective over the target tokens of a training batch, and the metrics to report; gradients reach
        `params` alone."""

    @abc.abstractmethod
    def outcomes(
        self, model: Llama, params: Params, frozen: Params, batch: ScoringBatch, threshold: Float[Array, ""]
    ) -> tuple[Outcomes, Float[Array, "B R"]]:
        """Computes the outcomes of each target token, and their weights: 1, and 0 for padding.

        Args:
            model: the backbone's program.
            params: the trained parameters.
            frozen: the backbone's.
            batch: rows of the scoring source.
            threshold: p(consult) above which the device is asked for the tokens before each.
        """

    @abc.abstractmethod
    def trained(self, threshold: float, params: Params, backbone: Backbone, template: str, date: str = "") -> Trained:
        """Returns what a run leaves: the method's parameters with the threshold in force, ready to be saved."""
