"""Benchmarks as the papers run them: rows, prompts, graders, estimates, reference numbers, reports. No torch."""
