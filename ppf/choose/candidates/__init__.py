"""Candidate policies: drawn at random, mutated, or bred on the predictor; none is measured here."""
