"""Objectives between students and targets, and regularisers of prototypes."""
