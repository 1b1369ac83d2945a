"""What computing prompts and answers apart costs and gains, beside workers that do both."""
