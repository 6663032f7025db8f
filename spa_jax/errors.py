"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """Bad input, named in one sentence together with the mend.

    Commands print the message alone and exit with its status; anything else that escapes a command is a bug in spa_jax
    and keeps its traceback.
    """

    status = 2
