"""The pure core: `job.step(state, event, *, now_s, limits) -> Decision`. No clock, no I/O, no wire types."""
