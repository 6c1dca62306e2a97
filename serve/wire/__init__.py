"""Messages to checked values and back, and the one error of the service. The client imports ``errors`` alone."""
