"""What a model does, measured on its real classes without their weights."""
