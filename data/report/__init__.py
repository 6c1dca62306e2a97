"""The HTML report of the ``labels`` stage. It reads tables and pictures and computes no labels."""
