"""Checkpoints from one format to another, tensor by tensor in bounded memory, with a proof of what became of each."""
