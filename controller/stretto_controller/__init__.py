"""The elastic training controller: decides who is a member of which job's generation, and keeps its word."""
