"""From samples to rows to learn from: filters, duplicates, quota, benchmarks kept out, patterns, review, mixture."""
