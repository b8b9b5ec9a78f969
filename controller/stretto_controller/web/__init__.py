"""The HTTP side: health, metrics, the jobs API and the page."""
