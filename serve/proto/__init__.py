"""The gRPC contract ``lookalike.v1`` and its Python, made by ``python -m lookalike.serve.proto.generate``."""
