"""A run as others see it: events recorded, counted and drawn."""
