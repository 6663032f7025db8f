"""Platforms that are not here."""

from spa_jax.models.partitioner import Partitioner


class OtherPlatform(Partitioner):
    """Some devices of another platform."""

    platform, num_devices = "", 1

    def __init__(self, platform, num_devices=1):
        object.__setattr__(self, "platform", platform)
        object.__setattr__(self, "num_devices", num_devices)
