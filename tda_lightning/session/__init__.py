"""What an estimator works with: the model, the recorded run and walks over the training set."""
