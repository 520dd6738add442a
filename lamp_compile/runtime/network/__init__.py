"""The learned look-ahead: a gate per layer that predicts which sub-tiles matter before any key byte is read."""
