"""The errors a user sees, and the exit code each one ends the command line with.

A message names the value given, the rule it broke and the remedy. Broken invariants are ``assert``; they are ours.
"""


class LookalikeError(Exception):
    """Base of all errors meant for the user: printed without a traceback by the command line."""

    exit_code = 1


class UsageError(LookalikeError, ValueError):
    """The user's input is wrong: a recipe, an override, a flag, a request, a corpus."""

    exit_code = 2


class ArtifactError(LookalikeError):
    """An artifact is missing, corrupt, newer than this code or of another kind than asked for."""

    exit_code = 3


class CorpusError(UsageError):
    """A corpus cannot be read as the recipe describes it."""
