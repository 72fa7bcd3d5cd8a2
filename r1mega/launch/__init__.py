"""From a checked configuration to running processes, and their orderly end."""
