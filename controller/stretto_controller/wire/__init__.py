"""Protocol messages <-> core values: `inbound` checks what comes, `outbound` says what goes."""
