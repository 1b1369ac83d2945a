"""Pages between two processes, beside what sockets and memory of this machine allow."""
