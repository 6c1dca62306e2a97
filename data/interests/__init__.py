"""Interests and clusters of terms, and which of them an image may have. Plain functions, no Ray."""
