"""The wiring of the ``labels`` stage: a module a step, each a thin layer of Ray Data over pure modules of ``data``."""
