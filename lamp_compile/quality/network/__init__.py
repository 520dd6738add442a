"""Training and measuring look-ahead networks: distillation from the model's own attention on a user's text."""
