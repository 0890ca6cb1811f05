"""Private helpers shared by every layer of the house: argument checks, optional imports, result types."""
