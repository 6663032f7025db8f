"""The exception for what the user can correct."""


class UserError(Exception):
    """Bad input; the message says in one sentence what is wrong and how to correct it.

    Commands print the message alone and exit with `status`. Any other exception that escapes a command is a bug in
    spa_jax and keeps its traceback.
    """

    status = 2
