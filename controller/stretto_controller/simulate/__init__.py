"""`stretto simulate`: what policies make of a trace of jobs on shared nodes, in simulated time."""
