"""The errors that users see, each with the exit code of the command line.

A message names the value given, the rule it broke and the remedy. Broken invariants are asserts: bugs of ours.
"""


class LookalikeError(Exception):
    """Base of all errors meant for the user; the command line prints them without a traceback."""

    exit_code = 1


class UsageError(LookalikeError, ValueError):
    """Wrong input: a recipe, an override, a flag, a request, a corpus."""

    exit_code = 2


class ArgumentError(UsageError, TypeError):
    """An argument of a call has the wrong type, or a name that the call does not know; nothing was done."""


class ArtifactError(LookalikeError):
    """An artifact is missing, damaged, newer than this code, or of the wrong kind."""

    exit_code = 3


class ForeignArtifactError(ArtifactError):
    """An artifact names a parent in another store, which is opened only if the user names its root."""


class CorpusError(UsageError):
    """A corpus cannot be read in the way the recipe describes."""
