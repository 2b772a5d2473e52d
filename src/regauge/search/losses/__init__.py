"""What each option of each place loses: KL to the original, predicted and measured. Nats a token; lower = better."""
