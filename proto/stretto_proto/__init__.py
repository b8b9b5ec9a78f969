"""Protocol buffers of Stretto, sources and generated code side by side."""
