"""Other libraries' ways into llmkern, one file each, imported on use."""
