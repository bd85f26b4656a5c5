"""What a finished run is asked for: a policy for any kind of budget, the checkpoint of it, and what either costs."""
