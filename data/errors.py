"""The base of all errors that a user can mend: command lines print their message, without a traceback."""


class UserError(ValueError):
    """A mistake in what the user gave: a recipe, shards, a checkpoint. Says what was got and what is allowed."""
