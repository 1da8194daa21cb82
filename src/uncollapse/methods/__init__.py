"""Objectives: one file each, reading like its paper."""
