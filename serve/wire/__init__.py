"""Messages to checked values and back, and the service's error. The client imports the modules without pydantic."""
