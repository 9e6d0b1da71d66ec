"""What codes the symbols of an operating point better than its own tables: contexts, and earlier frames."""
