"""Scores for filters: one pass over the calibration images, concepts, criteria."""
