"""The miniature's own benchmark: held-out requests, scored exactly."""
