"""Stages, their artifacts and what these are made of: a recipe from its base to its last model as one resumable run."""
