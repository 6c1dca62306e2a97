"""The commands of ``lookalike`` that belong to serving. May import every other room; none imports this one."""
