"""A stage's folder: its run, its checkpoints, its log, its plan, its health hints and the model's card."""
