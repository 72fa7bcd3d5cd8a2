"""The stages of R1 as one resumable run, the lineage of what they make, and the page that shows it. No torch."""
