"""The way in: gRPC ingress, tenants, queues, TLS, and the ``Service``. May import ``experiment`` and below."""
