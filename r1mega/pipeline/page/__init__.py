"""The page that shows a pipeline: curves, tables, samples and lineage as one HTML file."""
