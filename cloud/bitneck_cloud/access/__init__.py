"""Who may call: TLS, bearer tokens, resume tokens."""
