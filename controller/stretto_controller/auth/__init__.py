"""Who calls, and what they may: tokens, certificates, and one table of every method and route."""
