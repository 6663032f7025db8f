"""The setting and the threshold that a trained method runs with, and what ends its generations."""

from spa_jax.chat import end_of_answer
from spa_jax.choices import SETTINGS
from spa_jax.errors import UserError
from spa_jax.models.method import Method
from spa_jax.weights.backbone import Backbone


def resolve_setting(method: Method | None, setting: str | None, threshold: float | None) -> tuple[str, float]:
    """Returns the setting and the threshold to run with.

    Args:
        method: what was trained; None for the backbone alone.
        setting: by default the method's own.
        threshold: by default the method's own, which is also taken for a method without a router.

    Raises:
        UserError: the method cannot run in that setting, or the threshold is not a probability.
    """
    if method is None:
        if setting not in (None, "base"):
            raise UserError(f"setting '{setting}' needs a plugin: name one with --plugin")
        return "base", 0.5
    setting = setting or method.setting
    if method.side is None:
        if not method.runs_as(setting):
            raise UserError(f"a '{method.setting}' cannot run as '{setting}', only as what it is, or as base")
        return setting, method.threshold
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"threshold is {threshold}, but must lie between 0 (always ask) and 1 (never ask)")
    if not method.runs_as(setting):
        possible = ", ".join(each for each in SETTINGS if method.runs_as(each))
        raise UserError(f"a plugin trained as '{method.setting}' cannot run as '{setting}', only as {possible}")
    return setting, method.threshold if threshold is None else threshold


def stop_tokens(backbone: Backbone, template: str) -> tuple[int, ...]:
    """Returns the ids that end a generation, ascending: the backbone's, and the one that ends the targets of what was
    trained, which a checkpoint's own list may lack.

    Args:
        backbone: without stop tokens, nothing ends a generation but its length.
        template: the format of the rows that it was trained on; empty for the backbone alone.

    Raises:
        UserError: the chat template fails.
    """
    stops, tokenizer = backbone.eos_ids, backbone.tokenizer
    if not template or not stops or tokenizer is None:  # a backbone that only ever sees token ids needs no tokenizer
        return stops
    end = end_of_answer(tokenizer, template)
    return stops if end is None else tuple(sorted({*stops, end}))
