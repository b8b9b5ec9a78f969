"""The demonstration: a small real training, and a story of machines that come and go around it."""
