"""Memory, time and validity of a run that has not been started: no GPU, no weights, no data."""
