"""What is served and how it changes: write log, writer, followers. May import ``wire``, ``settings``, ``proto``."""
