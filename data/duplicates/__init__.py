"""Near-duplicates: signatures, the search for twins, and which rows go. Plain functions, no Ray."""
