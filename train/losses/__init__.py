"""Losses and their parts, as functions and modules of tensors. Knows neither data nor Ray."""
