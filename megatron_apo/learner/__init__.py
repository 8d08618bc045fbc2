"""What one batch of rollouts does to the policy: log-probs, targets, minibatches, optimizer steps; its checkpoints."""
