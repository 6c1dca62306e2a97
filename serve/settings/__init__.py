"""The settings of the service. Plain values: nothing here imports Ray, gRPC or another room."""
