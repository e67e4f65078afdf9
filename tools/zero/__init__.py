"""DeepSpeed's own folders: read without DeepSpeed, on any machine, and without running what their pickles say."""
