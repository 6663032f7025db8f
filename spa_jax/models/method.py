"""The interface of what is trained on a frozen backbone: a side plugin beside it, a LoRA or Adapter within its blocks.

A method is chosen once, from a config or from a trained directory. Whoever runs a backbone asks the method what it
needs: whether there is a side network, taps, a router, an adapter of blocks.
"""

import abc
from typing import TYPE_CHECKING, Literal

import jax

from spa_jax.models.block import ForwardHook, LlamaConfig
from spa_jax.models.llama import Entry, Params

if TYPE_CHECKING:
    from spa_jax.models.side import SideConfig


class Method(abc.ABC):
    """A way to adapt a frozen backbone; implementations are frozen dataclasses, so that programs compile for them.

    Attributes:
        setting: the name of the method in configs, `spa`, `s1`, `s2`, `s3`, `lora` or `adapter`.
        threshold: p(consult) above which the device is asked; 0 where there is no router to give one, and every token
            counts as consulted.
        side: the side network; None for a method that works within the backbone's blocks.
        taps: which hidden states h_0 ... h_L the side network reads, ascending.
        routed: whether a router decides for each token.
        entry: where corrections enter the backbone.
        edits: which positions are corrected, see `spa_jax.models.combine.Edits`.
    """

    setting: str
    threshold: float
    side: "SideConfig | None"
    taps: tuple[int, ...]
    routed: bool
    entry: Entry = "head"
    edits: Literal["targets", "all"] = "targets"

    @abc.abstractmethod
    def init_params(self, backbone: LlamaConfig, seed: int = 0) -> Params:
        """Returns fresh float32 parameters with which the adapted backbone equals the frozen one, where the setting
        allows it."""

    @abc.abstractmethod
    def runs_as(self, setting: str) -> bool:
        """Tells whether parameters trained by this method can run in another setting, such as `s1` of a `spa`."""

    def block_adapter(self, params: Params) -> ForwardHook | None:
        """Returns what the backbone's blocks add to their outputs, a pytree; None where they stay as they are."""
        return None

    def param_shapes(self, backbone: LlamaConfig) -> Params:
        """Returns shapes and dtypes of the parameters, without computing any."""
        return jax.eval_shape(lambda: self.init_params(backbone))
