"""What a job of several processes is made of. Imports no room above it."""
