"""What tests share: real controllers, and agents that speak raw gRPC."""
