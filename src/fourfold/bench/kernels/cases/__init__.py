"""The measured cases, one file a kernel."""
