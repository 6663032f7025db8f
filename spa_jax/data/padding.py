"""Padded lengths: few of them, so that few programs compile."""


def padded_length(length: int, least: int) -> int:
    """Rounds a length up to the next of least, 1.5, 2, 3, 4, 6, ... times least."""
    size = least
    while size < length:
        size *= 2
    return size * 3 // 4 if size * 3 // 4 >= max(length, least) else size
