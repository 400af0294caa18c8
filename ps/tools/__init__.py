"""What `zero-ps` does with folders that no server has to be running for."""
