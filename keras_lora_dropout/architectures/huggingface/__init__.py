"""What KerasHub's models are called, part by part, at Hugging Face."""
