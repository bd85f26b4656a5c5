"""What a user's module does that adds a family: imported in the process that reloads its results."""

from ppf.families import Family, register

register(Family("olmo", "Olmo"))
