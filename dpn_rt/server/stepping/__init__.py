"""What steps an engine for the server: a thread, or a process of its own."""
