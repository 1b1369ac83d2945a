"""What is computed: the families, their one decoder, and where its weights come from."""
