"""The networks: architecture, loss, training, calibration and inference."""
