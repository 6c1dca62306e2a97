"""The HTML report of the ``labels`` stage. Reads tables and pictures; computes no label."""
