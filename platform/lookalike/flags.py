"""The parser of every verb: flags in full, and a misspelt one refused with the nearest."""

import argparse
import re
from typing import Any, NoReturn

from lookalike.registry import nearest


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that takes no shortened flags and explains unknown ones."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        """Print usage and ``message``, with the flag that may be meant, and exit with 2."""
        unknown = re.fullmatch(r"unrecognized arguments: (--[^\s=]+).*", message, re.DOTALL)
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        super().error(message + (nearest(unknown[1], known) if unknown else ""))
