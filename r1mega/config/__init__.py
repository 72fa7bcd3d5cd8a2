"""What can be configured, how it is read, and what must hold before a run may start. Imports no torch."""
