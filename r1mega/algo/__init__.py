"""Pure tensor maths and integer planning of reinforcement learning. Imports torch and nothing of this package."""
