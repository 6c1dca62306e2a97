"""What is recorded of requests: trace, access log, recall monitor. May import ``search`` and the rooms below it."""
