"""Agents, workers and people meet the controller in three gRPC services."""
