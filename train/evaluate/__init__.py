"""The stages ``embed`` and ``evaluate``. May import ``feed``."""
