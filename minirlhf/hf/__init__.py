"""Hugging Face: GPT-2 folders in and out, and names on the hub."""
