"""One training: settings, optimizer, loop, checkpoints, curves, Ray Train. May import every room but ``publish``."""
