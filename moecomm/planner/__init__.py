"""What numbers say before and during a training: which rank holds which expert."""
