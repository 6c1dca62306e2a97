"""One training: settings, optimizer, loop, checkpoints, Ray Train. May import ``tasks``, ``feed``, ``losses``."""
