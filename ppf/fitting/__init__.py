"""Fitting: the stages that fill a run, the loop that measures and learns, and what a run is asked afterwards."""
