"""Subcommands of `stretto`: each module has one `register(app)`, named by an entry point. No torch at import."""
