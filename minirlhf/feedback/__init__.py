"""Feedback: answers to compare, labels by people and machines, their statistics, and the pairs to learn from."""
