"""Plumbing that the four scripts share: environments, seeding, checkpoints, the run folder."""
