"""Encoders as artifacts and beyond: the ``encoder`` stage, model cards, export, ONNX. May import ``feed``."""
