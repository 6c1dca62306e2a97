"""Near-duplicates: signatures, candidates, verification, components. Plain functions, no Ray."""
