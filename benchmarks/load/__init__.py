"""A load generator: thousands of agents and workers, each on a connection of its own, in one process."""
