"""`stretto top`: what the controller knows, on a terminal. The view is pure; the screen reads keys and draws."""
