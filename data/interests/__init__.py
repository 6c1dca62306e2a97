"""Interests and clusters of terms, and the labels of images. Plain functions, no Ray."""
