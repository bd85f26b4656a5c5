"""The elastic model: a run held in memory as one model of any size, and ``ppf.load`` that makes it."""
