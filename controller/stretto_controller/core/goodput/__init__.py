"""How large a job should be: what was seen of it, what that predicts for other sizes, and what follows. Pure."""
