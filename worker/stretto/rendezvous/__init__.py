"""The agent's side: the torchrun plug-in, its conversation with the controller, and the guardian of its workers."""
