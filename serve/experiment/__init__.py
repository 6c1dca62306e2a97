"""Experiments: arms, assignment, interleaving, guardrails, results. May import ``watch`` and the rooms below it."""
