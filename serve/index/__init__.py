"""The offline stages ``index`` and ``plan``. May import no other room of the wing."""
