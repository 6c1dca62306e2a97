"""Commands over recipes and artifacts. Each takes the arguments of its verb and returns the exit code."""
