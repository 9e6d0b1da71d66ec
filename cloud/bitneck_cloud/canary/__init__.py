"""A canary: another bundle of a model for some clients first, compared with the current one."""
